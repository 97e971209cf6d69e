package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/cmd/kms-agent/renew"
)

// renewal is what reencrypt is given on its command line.
type renewal struct {
	transfer
	renew.Options
	newContext   pairs
	clearContext bool
	recursive    bool
	state        string
	progress     progressKind
}

func newReencrypt(a *app) *cobra.Command {
	r := renewal{progress: progressAuto}
	c := &cobra.Command{
		Use:   "reencrypt [FILE-OR-DIRECTORY...]",
		Short: "Make new messages of old ones: a file, a stream, or whole trees",
		Long: `Opens a message and encrypts its plaintext anew, under another key, another
context or the newest version of its key. It needs decrypt on the old key and
encrypt on the new one. The agent does so inside itself for messages of up to
1 MiB; of longer ones the plaintext passes through this process's memory, piece by
piece, unless --no-stream refuses that. It is never written to a file.

Without arguments one message is read from --in and the new one written to --out.

Files and directories that are named, the directories with all below, are renewed
where they are: every message that is not under the current version of its key, or
is not yet as --to-key and --new-context want it. Each file is whole at every
moment, the old message or the new one. It keeps its mode, owner and attributes.
Files that are no messages of a kms-agent, and symbolic links, are left alone. A run
that ended early is gone on with by the same command; with --state it also knows
what failed, and why.`,
		Example: `  kms-agent reencrypt --to-key archive --in old.enc --out new.enc
  kms-agent reencrypt --dry-run /srv/invoices
  kms-agent reencrypt --state /var/tmp/invoices.state /srv/invoices`,
		RunE: func(c *cobra.Command, paths []string) error {
			if err := r.check(c, paths); err != nil {
				return err
			}
			if len(paths) > 0 {
				return a.reencryptTrees(c.Context(), &r, paths)
			}
			if err := a.refuseTerminal(r.out); err != nil {
				return err
			}
			return a.reencrypt(c.Context(), &r)
		},
	}
	flags := c.Flags()
	flags.StringVar(&r.ToKey, "to-key", "", "key of the new message (without it: the old one's)")
	r.newContext.flag(c, "new-context", "", "NAME=VALUE of the new message's context, instead of the old one's; may be repeated")
	flags.BoolVar(&r.clearContext, "clear-context", false, "give the new message no context")
	flags.BoolVar(&r.NoStream, "no-stream", false, "refuse what is too long for the agent to do inside itself")
	a.treeFlags(c, &r)
	a.transferFlags(c, &r.transfer, "NAME=VALUE that must stand in the old message's context; may be repeated")
	return c
}

// check turns the flags into options.
func (r *renewal) check(c *cobra.Command, paths []string) error {
	if err := rightMode(c, paths); err != nil {
		return err
	}
	var err error
	if r.NewContext, err = r.newContext.parse(); err != nil {
		return err
	}
	if r.clearContext && len(r.NewContext) > 0 {
		return usagef("--clear-context and --new-context exclude each other")
	}
	r.ReplaceContext = r.clearContext || len(r.NewContext) > 0
	if r.Expected, err = r.context.parse(); err != nil {
		return err
	}
	stale, err := r.stale.value()
	if err != nil {
		return err
	}
	if stale != nil {
		r.MaxStale = &r.stale.age
	}
	r.Timeout = r.timeout
	if len(paths) == 0 {
		return nil
	}
	return r.checkTrees()
}

// reencrypt renews one message from the input to the output.
func (a *app) reencrypt(ctx context.Context, r *renewal) error {
	return a.stream(ctx, &r.transfer, modePublic, func(ctx context.Context, c *client.Client, size int64, in io.Reader, out io.Writer) error {
		begin, err := interruptible(ctx, func() ([]byte, error) { return io.ReadAll(io.LimitReader(in, renew.MaxInside+1)) })
		if err != nil {
			return fmt.Errorf("read the message: %w", err)
		}
		source, made, err := a.reencryptInside(ctx, r, c, begin, out)
		if renew.TooLarge(err) && !r.NoStream {
			source, made, err = renew.Through(ctx, c, &r.Options, io.MultiReader(bytes.NewReader(begin), in), size, out)
		}
		switch {
		case errors.Is(err, renew.ErrTooLong):
			return &codedError{code: exitInvalid, err: err, hint: "without --no-stream it passes through this process"}
		case err == nil && r.verbose:
			a.note("from %s; to %s", keyUse(source), keyUse(made))
		}
		return err
	})
}

// reencryptInside has the agent renew a message that it takes at once.
func (a *app) reencryptInside(ctx context.Context, r *renewal, c *client.Client, message []byte, out io.Writer) (source, made *client.KeyUse, err error) {
	if len(message) > renew.MaxInside {
		return nil, nil, renew.ErrTooLong
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	answer, err := c.ReEncrypt(ctx, r.Request(message))
	if err != nil {
		return nil, nil, err
	}
	_, err = out.Write(answer.GetMessage())
	return answer.GetSource(), answer.GetDestination(), err
}

// contextLine writes a context in the order of its names.
func contextLine(context map[string]string) string {
	if len(context) == 0 {
		return "-"
	}
	var words []string
	for _, name := range slices.Sorted(maps.Keys(context)) {
		words = append(words, fmt.Sprintf("%s=%s", printable(name), printable(context[name])))
	}
	return strings.Join(words, " ")
}
