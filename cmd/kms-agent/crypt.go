package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/spf13/cobra"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// transfer is what encrypt, decrypt and reencrypt have in common: something is
// read, something is written.
type transfer struct {
	connection
	in, out string
	force   bool
	verbose bool
	context pairs
	stale   staleness
}

func (a *app) transferFlags(c *cobra.Command, t *transfer, contextUsage string) {
	c.Flags().VarP(pathFlag{&t.in}, "in", "i", "read this file instead of standard input")
	c.Flags().VarP(pathFlag{&t.out}, "out", "o", "write this file, whole or not at all, instead of standard output")
	c.Flags().BoolVar(&t.force, "force", false, "replace the output file where it exists")
	c.Flags().BoolVarP(&t.verbose, "verbose", "v", false, "say on standard error which key was used and how fresh it is")
	t.context.flag(c, "context", "c", contextUsage)
	t.stale.flag(c)
	a.connectionFlags(c, &t.connection)
}

func newEncrypt(a *app) *cobra.Command {
	t := transfer{}
	var key string
	c := &cobra.Command{
		Use:   "encrypt --key KEY",
		Short: "Encrypt a file or a stream",
		Long: `Encrypts data of any length under a key of the agent. The result is a message in
the AWS Encryption SDK format; the encryption context stands in it, readable and
authenticated. Never put secrets into the context.`,
		Example: `  kms-agent encrypt --key orders --context tenant=acme --in invoice.pdf --out invoice.pdf.enc
  tar c data | kms-agent encrypt --key backup > data.tar.enc`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if key == "" {
				return usagef("which key? Name it with --key")
			}
			if err := a.refuseTerminal(t.out); err != nil {
				return err
			}
			return a.encrypt(c.Context(), key, &t)
		},
	}
	c.Flags().StringVarP(&key, "key", "k", "", "key of the agent to encrypt under")
	a.transferFlags(c, &t, "NAME=VALUE of the encryption context; may be repeated")
	return c
}

func newDecrypt(a *app) *cobra.Command {
	t := transfer{}
	c := &cobra.Command{
		Use:   "decrypt",
		Short: "Decrypt a file or a stream",
		Long: `Opens a message of any length. The key is read from the message. The context
pairs given must all stand in the message's own.

An output file appears whole, with mode 0600, or not at all. What goes to a pipe
is verified piece by piece and cannot be taken back: when the exit code is not 0,
throw it away (code 6 says that part of it was written).`,
		Example: `  kms-agent decrypt --in invoice.pdf.enc --out invoice.pdf
  kms-agent decrypt --context tenant=acme < data.tar.enc | tar x`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error { return a.decrypt(c.Context(), &t) },
	}
	a.transferFlags(c, &t, "NAME=VALUE that must stand in the message's context; may be repeated")
	return c
}

// refuseTerminal keeps ciphertext off the screen.
func (a *app) refuseTerminal(out string) error {
	if (out == "" || out == "-") && isTerminal(a.out) {
		return usagef("the result is binary and standard output a terminal; name a file with --out, or use a pipe")
	}
	return nil
}

func (a *app) encrypt(ctx context.Context, key string, t *transfer) error {
	pairs, err := t.context.parse()
	if err != nil {
		return err
	}
	stale, err := t.stale.value()
	if err != nil {
		return err
	}
	start := &kmsagentv1.EncryptStreamStart{Key: key, Context: pairs, MaxStale: stale}
	return a.stream(ctx, t, modePublic, func(ctx context.Context, c *client.Client, size int64, r io.Reader, w io.Writer) error {
		// A file of no length may be one of /proc, which has content all the same.
		start.LengthLimit = uint64(max(size, 0))
		use, err := c.EncryptStream(ctx, start, r, w)
		if err == nil && t.verbose {
			a.note("encrypted under %s", keyUse(use))
		}
		return err
	})
}

func (a *app) decrypt(ctx context.Context, t *transfer) error {
	pairs, err := t.context.parse()
	if err != nil {
		return err
	}
	stale, err := t.stale.value()
	if err != nil {
		return err
	}
	start := &kmsagentv1.DecryptStreamStart{ExpectedContext: pairs, MaxStale: stale}
	return a.stream(ctx, t, modeSecret, func(ctx context.Context, c *client.Client, _ int64, r io.Reader, w io.Writer) error {
		header, err := c.DecryptStream(ctx, start, r, w)
		if err == nil && t.verbose {
			a.note("decrypted with %s, context %s", keyUse(header.GetKeyUse()), contextLine(header.GetContext()))
		}
		return err
	})
}

// streamCall is one direction of streaming over an open connection. size is the
// length of what r holds, -1 where that is not known.
type streamCall func(ctx context.Context, c *client.Client, size int64, r io.Reader, w io.Writer) error

// stream runs do between input and output and makes the output whole at the
// end, or leaves nothing.
func (a *app) stream(ctx context.Context, t *transfer, mode fs.FileMode, do streamCall) error {
	in, err := a.openInput(ctx, t.in)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := a.openOutput(ctx, t.out, mode, t.force)
	if err != nil {
		return err
	}
	defer out.discard()
	c, err := a.dial(ctx, &t.connection)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	shown := isTerminal(a.errOut) && (out.pending != nil || !isTerminal(a.out))
	p := startProgress(in, in.size, a.errOut, shown)
	defer p.stop()
	err = do(ctx, c, in.size, p, out)
	p.stop()
	if err == nil {
		return out.commit()
	}
	if out.leaked() {
		return &codedError{
			code: exitIncomplete, hint: "use --out FILE, which appears whole or not at all", err: err,
			prefix: fmt.Sprintf("the output is incomplete, throw its %d bytes away: ", out.written),
		}
	}
	return err
}

func keyUse(u *kmsagentv1.KeyUse) string {
	return fmt.Sprintf("%s version %s, %s", u.GetKey(), u.GetKeyVersion(), freshness(u.GetFreshness()))
}

// freshness says how the key behind an answer is known to be good.
func freshness(f *kmsagentv1.Freshness) string {
	switch f.GetSource() {
	case kmsagentv1.Freshness_SOURCE_UPSTREAM:
		return "confirmed upstream"
	case kmsagentv1.Freshness_SOURCE_CACHED:
		return "cached, confirmed " + ago(f.GetAge().AsDuration())
	case kmsagentv1.Freshness_SOURCE_GRACE:
		return fmt.Sprintf("in grace, confirmed %s, %v left", ago(f.GetAge().AsDuration()), f.GetGraceLeft().AsDuration().Round(time.Second))
	default:
		return "freshness unknown"
	}
}
