package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

func newRoot(a *app) *cobra.Command {
	root := group("kms-agent", "An encryption endpoint for every workload of this host", `kms-agent gives the workloads of this host an encryption endpoint on a Unix
socket. It knows its callers by their SPIFFE identity, keeps data keys in
protected memory and asks key services to wrap them.`)
	root.SilenceErrors, root.SilenceUsage = true, true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.errOut)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usagef("%v", err) })
	root.AddGroup(
		&cobra.Group{ID: groupUse, Title: "Use an agent:"},
		&cobra.Group{ID: groupRun, Title: "Run an agent:"},
		&cobra.Group{ID: groupOperate, Title: "Operate it:"},
	)
	add(root, groupUse, newEncrypt(a), newDecrypt(a), newReencrypt(a), newDatakey(a), newWrap(a), newUnwrap(a),
		newRandom(a), newKeys(a), newHSM(a), newWhoami(a))
	add(root, groupRun, newRunCommand(a), newDev(a), newCheck(a), newConfig(a))
	add(root, groupOperate, newStatus(a), newPlugin(a), newAudit(a), newPolicy(a), newEvict(a), newReload(a), newLogLevel(a), newProfile(a), newVersion(a))
	root.AddCommand(newCompletion(a), exitCodesTopic())
	offerFilesWhereTheyFit(root)
	return root
}

const (
	groupUse     = "use"
	groupRun     = "run"
	groupOperate = "operate"
)

func add(root *cobra.Command, id string, commands ...*cobra.Command) {
	for _, c := range commands {
		c.GroupID = id
		root.AddCommand(c)
	}
}

// group makes a command that only holds others: without one of them, or with an
// unknown one, it is used wrongly.
func group(use, short, long string) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Args: cobra.ArbitraryArgs,
		FParseErrWhitelist: cobra.FParseErrWhitelist{UnknownFlags: true}, // they are those of a command that is misspelt
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			_, _ = fmt.Fprint(c.ErrOrStderr(), c.UsageString())
			return usagef("which command?")
		}
		message := fmt.Sprintf("unknown command %q", args[0])
		if guesses := nearNames(c, args[0]); len(guesses) > 0 {
			message += "; did you mean " + strings.Join(guesses, " or ") + "?"
		}
		return usagef("%s", message)
	}
	c.SuggestionsMinimumDistance = 2
	return c
}

// nearNames are the commands of a group that may be meant. Two letters that differ are a
// slip in a long word; a short one that begins otherwise is another word.
func nearNames(c *cobra.Command, typed string) []string {
	return slices.DeleteFunc(c.SuggestionsFor(typed), func(name string) bool {
		return len(typed) < 6 && !strings.HasPrefix(name, typed[:min(1, len(typed))])
	})
}

// exactly demands the named arguments.
func exactly(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usagef("%s is missing", strings.Join(names[len(args):], " and "))
		case len(args) > len(names) && len(names) == 0 && c.Flags().Lookup("in") != nil:
			return usagef("unexpected argument %q; a file is named with --in or --out", args[0])
		case len(args) > len(names):
			return usagef("unexpected argument %q", args[len(names)])
		}
		return nil
	}
}

func exitCodesTopic() *cobra.Command {
	var b strings.Builder
	b.WriteString("Exit codes of every command:\n\n")
	for _, row := range exitCodes() {
		fmt.Fprintf(&b, "  %3d  %s\n", row.code, row.meaning)
	}
	return &cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: b.String()}
}
