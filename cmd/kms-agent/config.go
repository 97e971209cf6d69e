package main

import (
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kms-agent/kms-agent/agent"
)

const (
	defaultConfigPath = "/etc/kms-agent/config.yaml"
	maxConfig         = 4 << 20
)

func newConfig(a *app) *cobra.Command {
	c := group("config", "Write a configuration to start from, and explain its fields", "")
	c.AddCommand(newConfigExplain(a))
	c.AddCommand(&cobra.Command{
		Use: "default", Short: "Print an annotated configuration", Args: exactly(),
		Example: "  kms-agent config default > /etc/kms-agent/config.yaml",
		RunE: func(*cobra.Command, []string) error {
			_, err := a.out.Write(agent.DefaultConfig())
			return err
		},
	})
	return c
}

// newConfigExplain makes config explain.
func newConfigExplain(a *app) *cobra.Command {
	c := &cobra.Command{
		Use: "explain [FIELD]", Short: "Tell what a field of the configuration means",
		Long: `Prints the values, the default and the meaning of a field, or of every field
below it; without FIELD of all. Paths are as check reports them: keys[0].cache.max_age
and keys.cache.max_age are one.`,
		Example: "  kms-agent config explain audit.sinks\n  kms-agent config explain 'keys[].cache.max_age' --output json",
		Args:    cobra.MaximumNArgs(1),
		ValidArgsFunction: func(_ *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
			var paths []string
			for _, f := range agent.ExplainConfig("") {
				if len(args) == 0 && strings.HasPrefix(f.Path, begun) {
					paths = append(paths, f.Path)
				}
			}
			return paths, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			path := strings.Join(args, "")
			fields := agent.ExplainConfig(path)
			if len(fields) == 0 {
				return &codedError{code: exitUsage, err: fmt.Errorf("the configuration has no field %q", path), hint: "kms-agent config explain lists them all"}
			}
			return a.print(fields, func(t *table) {
				for i, f := range fields {
					if i > 0 {
						t.row("", "")
					}
					t.row(f.Path, plainText(f.Meaning))
					t.row("  value", plainText(f.Value))
					t.row("  default", plainText(f.Default))
				}
			})
		},
	}
	a.outputFlag(c)
	return c
}

// plainText takes the marks of Markdown out of a text.
func plainText(text string) string {
	text = regexp.MustCompile(`\[([^]]*)\]\(([^)]*)\)`).ReplaceAllString(text, "$1")
	return strings.ReplaceAll(text, "`", "")
}

// checkResult is what check prints.
type checkResult struct {
	File     string       `json:"file"`
	OK       bool         `json:"ok"`
	Faults   []checkFault `json:"faults"`
	Warnings []checkFault `json:"warnings"`
	// FileOnly: what the configuration names was not looked at.
	FileOnly bool `json:"file_only"`
	Backends int  `json:"backends"`
	Keys     int  `json:"keys"`
	Rules    int  `json:"rules"`
}

type checkFault struct {
	File    string `json:"file"`
	Line    int    `json:"line"`
	Column  int    `json:"column"`
	Path    string `json:"path"`
	Message string `json:"message"`
}

func newCheck(a *app) *cobra.Command {
	ofHost, fileOnly, config := false, false, ""
	c := &cobra.Command{
		Use:   "check [FILE]",
		Short: "Report everything that is wrong with a configuration",
		Long: `Reads a configuration, and the policy files that it names, and reports every
fault at once with file, line, column and path. Where the file has none it looks
at what the file names on this host: directories, sockets, keystore and seal,
plugins and their digests, the settings of PKCS#11 backends (which it asks their
plugin about; the vendor's library is not loaded), files with secrets, the audit
log and its key. Faults keep the agent or a backend from starting, are damage, or
can never work, as the URI of another token; warnings leave the exit code at 0. It
changes nothing, and touches neither the network nor a running agent. FILE, or
--config FILE as with other commands, is
` + defaultConfigPath + ` unless given; - is standard input, and then relative
paths are relative to the working directory.

Run it as the agent's user: what root may read, the agent may not. --file-only
leaves out what is of this host, users and groups too, for a configuration of
another one.

With --host it tells instead what this host lacks of what the agent uses (kinds of
memory, process handles, confinement), what that means and what gives it. Run it
as the agent's user, in its unit.`,
		Example: "  kms-agent check\n  sudo -u kms-agent kms-agent check\n  kms-agent check --host\n  kms-agent config default | kms-agent check --file-only -",
		Args:    cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			path, named := defaultConfigPath, c.Flags().Changed("config")
			switch {
			case ofHost && (len(args) > 0 || fileOnly || named):
				return usagef("--host is about this host and takes no file")
			case ofHost:
				findings := agent.CheckHost()
				return a.print(findings, func(t *table) { hostTable(t, findings) })
			case len(args) > 1:
				return usagef("unexpected argument %q; check takes one file", args[1])
			case len(args) == 1 && named:
				return usagef("--config %s and %s: the file is named once", config, args[0])
			case len(args) == 1:
				path = args[0]
			case named:
				path = config
			}
			return a.check(c.Context(), path, fileOnly)
		},
	}
	c.Flags().StringVar(&config, "config", defaultConfigPath, "the configuration, as FILE names it")
	c.Flags().BoolVar(&ofHost, "host", false, "tell what this host lacks")
	c.Flags().BoolVar(&fileOnly, "file-only", false, "do not look at what the file names on this host; for a configuration of another one")
	a.outputFlag(c)
	return c
}

func hostTable(t *table, findings []agent.HostFinding) {
	t.header("HOST", "STATE", "FOUND")
	for _, f := range findings {
		if f.OK {
			t.row(f.Name, "ok", f.Found)
			continue
		}
		t.row(f.Name, "lacking", f.Found)
		t.row("", "", "means: "+f.Means)
		t.row("", "", "cure:  "+f.Cure)
	}
}

// check reads a configuration, from standard input where path is "-", and
// reports what is wrong with it.
func (a *app) check(ctx context.Context, path string, fileOnly bool) error {
	name, data, err := a.readConfig(ctx, path)
	if err != nil {
		return err
	}
	found := agent.CheckConfig(name, data, fileOnly)
	if found.Config != nil && !fileOnly {
		checkDescriptors(&found, agent.InheritedDescriptors())
		checkHSMs(ctx, &found)
	}
	result := checkResult{
		File: path, OK: len(found.Faults) == 0, FileOnly: fileOnly,
		Faults: checkFaults(found.Faults), Warnings: checkFaults(found.Warnings),
	}
	if cfg := found.Config; cfg != nil {
		result.Backends, result.Keys, result.Rules = len(cfg.Backends), len(cfg.Keys), len(cfg.Policy)
	}
	if a.format == formatJSON {
		if err := a.printJSON(result); err != nil {
			return err
		}
	} else {
		for _, w := range found.Warnings {
			_, _ = fmt.Fprintln(a.errOut, "warning: "+w.Error())
		}
	}
	switch n := len(result.Faults); {
	case n > 0 && a.format == formatJSON:
		return &codedError{code: exitInvalid, err: fmt.Errorf("%s has %s", path, counted(n, "fault"))}
	case n > 0:
		return found.Faults
	case a.format == formatJSON:
		return nil
	}
	return a.print(result, func(t *table) { t.row(checkLine(result)) })
}

// checkDescriptors warns of open files that plugins are to be handed, and that this
// process was not: the agent does not start without them, and may be handed them in
// its unit.
func checkDescriptors(found *agent.Check, mine agent.Descriptors) {
	for i, b := range found.Config.Backends {
		for j, name := range b.Descriptors {
			if _, err := mine.Named(name); err != nil {
				found.Add(true, fmt.Sprintf("backends[%d].descriptors[%d]", i, j), err.Error()+"; the agent, which may be handed it, does not start without")
			}
		}
	}
}

func checkFaults(faults agent.Faults) []checkFault {
	list := []checkFault{}
	for _, f := range faults {
		list = append(list, checkFault(f))
	}
	return list
}

func checkLine(r checkResult) string {
	line := r.File + ": no faults"
	if n := len(r.Warnings); n > 0 {
		line += ", " + counted(n, "warning")
	}
	if r.FileOnly {
		line += " in the file itself"
	}
	return fmt.Sprintf("%s (%s, %s, %s)", line, counted(r.Backends, "backend"), counted(r.Keys, "key"), counted(r.Rules, "policy rule"))
}

func counted(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// readConfig reads a configuration file, or standard input where path is "-".
func (a *app) readConfig(ctx context.Context, path string) (name string, data []byte, err error) {
	if path != "-" {
		return agent.ReadConfig(path)
	}
	if name, err = filepath.Abs("stdin"); err != nil {
		return "", nil, err
	}
	data, err = a.readInput(ctx, path, maxConfig, "standard input")
	return name, data, err
}
