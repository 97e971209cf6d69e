package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/spf13/cobra"

	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/cmd/kms-agent/renew"
)

const (
	defaultJobs = 4
	maxJobs     = 64
	defaultWait = 2 * time.Minute
)

// treeFlags gives reencrypt what only files and directories that are named need.
func (a *app) treeFlags(c *cobra.Command, r *renewal) {
	flags := c.Flags()
	flags.BoolVarP(&r.recursive, "recursive", "r", true, "take what is in directories below those named too; =false leaves it out")
	flags.StringArrayVar(&r.Filter.Include, "include", nil, "take only files whose name (or path below the directory named, where there is a / in it) matches this pattern; may be repeated")
	flags.StringArrayVar(&r.Filter.Exclude, "exclude", nil, "leave out files and directories that match this pattern; may be repeated")
	flags.StringVar(&r.Filter.Key, "key", "", "only messages of this key")
	flags.StringVar(&r.Filter.WrappingKey, "wrapping-key", "", "only messages that this wrapping key opens, by its URI as --dry-run shows it")
	flags.Uint64Var(&r.Filter.OlderThan, "older-than-version", 0, "only messages under a version of the wrapping key below this number")
	flags.BoolVar(&r.All, "all", false, "also messages that are as they should be already")
	flags.BoolVar(&r.DryRun, "dry-run", false, "change nothing; count what there is, by key and version, and what would be done")
	flags.BoolVar(&r.Verify, "verify", false, "decrypt each new message and its old one and compare them, before the old one goes")
	flags.BoolVar(&r.KeepTimes, "keep-times", false, "keep the files' times of the last change and access")
	flags.BoolVar(&r.BreakHardLinks, "break-hard-links", false, "renew files that have other names too; those keep the old message")
	flags.BoolVar(&r.FailFast, "fail-fast", false, "stop at the first failure")
	flags.IntVarP(&r.Jobs, "jobs", "j", defaultJobs, "files under way at a time")
	flags.DurationVar(&r.Wait, "wait", defaultWait, "how long to wait for an agent, or a backend, that does not answer or asks for patience")
	flags.Var(pathFlag{&r.state}, "state", "remember in this file what is done and what failed; the same command goes on with it")
	flags.Var(&r.progress, "progress", "what to show meanwhile: auto (a line, on a terminal), json (a line each second) or none")
	_ = c.RegisterFlagCompletionFunc("progress", cobra.FixedCompletions([]string{"auto", "json", "none"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("wrapping-key", cobra.NoFileCompletions)
	a.outputFlag(c)
}

// rightMode refuses flags that do nothing for what is asked.
func rightMode(c *cobra.Command, paths []string) error {
	only := []string{"in", "out", "force"}
	why := "is for one message; files that are named are renewed where they are"
	if len(paths) == 0 {
		only = []string{
			"recursive", "include", "exclude", "key", "wrapping-key", "older-than-version", "all", "dry-run", "verify", "keep-times",
			"break-hard-links", "fail-fast", "jobs", "wait", "state", "progress", "output",
		}
		why = "is for files and directories that are named as arguments"
	}
	for _, name := range only {
		if c.Flags().Changed(name) {
			return usagef("--%s %s", name, why)
		}
	}
	for _, path := range paths {
		if path == "" {
			return usagef("the name of a file is empty")
		}
	}
	return nil
}

func (r *renewal) checkTrees() error {
	r.Filter.Flat = !r.recursive
	if err := r.Filter.Check(); err != nil {
		return usagef("%v", err)
	}
	switch {
	case r.Jobs < 1 || r.Jobs > maxJobs:
		return usagef("--jobs must be between 1 and %d", maxJobs)
	case r.Wait < 0:
		return usagef("--wait must not be negative")
	case r.DryRun && r.state != "":
		return usagef("--dry-run does nothing that --state could remember")
	case r.state == "-":
		return usagef("--state must name a file")
	}
	return nil
}

// reencryptTrees renews files where they are, and prints what became of them.
func (a *app) reencryptTrees(ctx context.Context, r *renewal, paths []string) (err error) {
	if r.state != "" {
		if r.State, err = renew.OpenState(r.state, r.Settings); err != nil {
			return stateError(err)
		}
		defer func() { err = errors.Join(err, r.State.Close()) }()
	}
	c, err := a.dial(ctx, &r.connection)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	summary, err := a.watchTrees(ctx, r, c, paths)
	if summary == nil {
		return treesError(nil, err)
	}
	if printErr := a.printSummary(summary, err); printErr != nil {
		return errors.Join(printErr, err)
	}
	return treesError(summary, err)
}

// watchTrees runs the renewal and shows how far it is. Without a summary it has
// not begun.
func (a *app) watchTrees(ctx context.Context, r *renewal, c *client.Client, paths []string) (*renew.Summary, error) {
	r.Progress = &renew.Progress{}
	if r.verbose {
		r.Renewed = func(path string, from, to renew.Label) { a.note("%s: from %s to %s", printable(path), from, to) }
	}
	stop := a.showTrees(ctx, r, paths)
	defer stop()
	return renew.Run(ctx, c, r.Options, paths)
}

// treesError gives the end of a run its exit code and words.
func treesError(s *renew.Summary, err error) error {
	var stopped *renew.StoppedError
	const goesOn = "the same command goes on where this one ended"
	switch {
	case errors.As(err, &stopped):
		return &codedError{code: classify(stopped.Err).code, prefix: "stopped before every file was seen: ", hint: goesOn, err: stopped.Err}
	case errors.Is(err, renew.ErrSymlink):
		return &codedError{code: exitInvalid, err: err}
	case errors.Is(err, renew.ErrFailed):
		return &codedError{
			code: exitPartly, hint: "the same command tries them again; --state FILE keeps all of the reasons",
			err: fmt.Errorf("%d files were not renewed", s.Counts[renew.Failed].Files),
		}
	}
	return err
}

// stateError gives what is wrong with a state file its exit code.
func stateError(err error) error {
	coded := &codedError{code: exitInvalid, err: err}
	switch {
	case errors.Is(err, renew.ErrStateBusy):
		coded.code, coded.hint = exitUnavailable, "wait for the other run, or give this one a file of its own"
	case errors.Is(err, renew.ErrStateOwner), errors.Is(err, fs.ErrPermission):
		coded.code = exitDenied
	case errors.Is(err, renew.ErrStateSettings):
		coded.hint = "--to-key, --new-context, --clear-context and --all must be those that it began with; or name another file"
	case errors.Is(err, renew.ErrState):
		coded.hint = "name another file: what is done is found out from the messages themselves"
	default:
		coded.code = localCode(err)
	}
	return coded
}
