package main

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/kms-agent/kms-agent/agent"
)

const (
	defaultConfigPath = "/etc/kms-agent/config.yaml"
	maxConfig         = 4 << 20
)

func newConfig(a *app) *cobra.Command {
	c := group("config", "Write a configuration to start from", "")
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

// checkResult is what check prints.
type checkResult struct {
	File     string       `json:"file"`
	OK       bool         `json:"ok"`
	Faults   []checkFault `json:"faults"`
	Backends int          `json:"backends"`
	Keys     int          `json:"keys"`
	Rules    int          `json:"rules"`
}

type checkFault struct {
	File    string `json:"file"`
	Line    int    `json:"line"`
	Column  int    `json:"column"`
	Path    string `json:"path"`
	Message string `json:"message"`
}

func newCheck(a *app) *cobra.Command {
	ofHost := false
	c := &cobra.Command{
		Use:   "check [FILE]",
		Short: "Report everything that is wrong with a configuration",
		Long: `Reads a configuration, and the policy files that it names, and reports every
fault at once with file, line, column and path. It touches neither the network
nor a running agent. FILE is ` + defaultConfigPath + ` unless given; - is standard
input, and then relative paths are relative to the working directory.

With --host it tells instead what this host lacks of what the agent uses (kinds of
memory, process handles, confinement), what that means and what gives it. Run it
as the agent's user, in its unit.`,
		Example: "  kms-agent check\n  kms-agent check --host\n  kms-agent config default | kms-agent check -",
		Args:    cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			path := defaultConfigPath
			if ofHost && len(args) > 0 {
				return usagef("--host is about this host and takes no file")
			}
			if ofHost {
				findings := agent.CheckHost()
				return a.print(findings, func(t *table) { hostTable(t, findings) })
			}
			if len(args) > 1 {
				return usagef("unexpected argument %q; check takes one file", args[1])
			}
			if len(args) == 1 {
				path = args[0]
			}
			cfg, err := a.loadConfig(c.Context(), path)
			return a.reportCheck(path, cfg, err)
		},
	}
	c.Flags().BoolVar(&ofHost, "host", false, "tell what this host lacks")
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

// loadConfig loads a file, or standard input where path is "-".
func (a *app) loadConfig(ctx context.Context, path string) (*agent.Config, error) {
	if path != "-" {
		return agent.LoadConfig(path)
	}
	data, err := a.readInput(ctx, path, maxConfig, "standard input")
	if err != nil {
		return nil, err
	}
	name, err := filepath.Abs("stdin")
	if err != nil {
		return nil, err
	}
	return agent.ParseConfig(name, data)
}

func (a *app) reportCheck(path string, cfg *agent.Config, err error) error {
	result := checkResult{File: path, OK: err == nil, Faults: []checkFault{}}
	if faults, ok := err.(agent.Faults); ok { //nolint:errorlint // ParseConfig returns it unwrapped
		for _, f := range faults {
			result.Faults = append(result.Faults, checkFault(f))
		}
	}
	if cfg != nil {
		result.Backends, result.Keys, result.Rules = len(cfg.Backends), len(cfg.Keys), len(cfg.Policy)
	}
	if err == nil || (a.format == formatJSON && len(result.Faults) > 0) {
		printed := a.print(result, func(t *table) {
			t.row(fmt.Sprintf("%s: no faults (%d backends, %d keys, %d policy rules)", path, result.Backends, result.Keys, result.Rules))
		})
		if printed != nil {
			return printed
		}
	}
	if n := len(result.Faults); n > 0 && a.format == formatJSON {
		return &codedError{code: exitInvalid, err: fmt.Errorf("%s has %d faults", path, n)}
	}
	return err
}
