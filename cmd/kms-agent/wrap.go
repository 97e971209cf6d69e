package main

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strconv"

	"github.com/spf13/cobra"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

var errNoWrapped = errors.New("this holds no encrypted data key")

const (
	maxWrapped = 4096  // bytes of key material that wrap takes
	maxRandom  = 65536 // bytes of one random answer
)

func newWrap(a *app) *cobra.Command {
	k := keyCommand{}
	var in string
	c := &cobra.Command{
		Use:   "wrap --key KEY",
		Short: "Wrap key material under the wrapping key itself",
		Long: `Wraps 1 to 4096 bytes, read from standard input or --in, directly under the
wrapping key in the backend, and prints a JSON document that unwrap reads.`,
		Example: "  kms-agent wrap --key orders --in app.key > app.key.json",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if k.key == "" {
				return usagef("which key? Name it with --key")
			}
			pairs, err := k.context.parse()
			if err != nil {
				return err
			}
			secret, err := a.readInput(c.Context(), in, maxWrapped, "the key material")
			if err != nil {
				return err
			}
			defer clear(secret)
			return a.call(c.Context(), &k.connection, func(ctx context.Context, c *client.Client) error {
				response, err := c.Wrap(ctx, &kmsagentv1.WrapRequest{Key: k.key, Plaintext: secret, Context: pairs})
				if err != nil {
					return err
				}
				return a.printWrapped(response, response.GetWrapped(), response.GetKeyUse())
			})
		},
	}
	c.Flags().StringVarP(&k.key, "key", "k", "", "key of the agent to wrap under")
	c.Flags().VarP(pathFlag{&in}, "in", "i", "read this file instead of standard input")
	k.context.flag(c, "context", "c", "NAME=VALUE of the encryption context, bound to the wrapped key; may be repeated")
	a.documentFlag(c)
	a.connectionFlags(c, &k.connection)
	return c
}

func newUnwrap(a *app) *cobra.Command {
	t := transfer{}
	c := &cobra.Command{
		Use:     "unwrap",
		Short:   "Open what wrap made",
		Long:    "Reads the JSON document that wrap printed, and writes the bare bytes of the key material.",
		Example: "  kms-agent unwrap --in app.key.json --out app.key",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := a.refuseTerminal(t.out); err != nil {
				return err
			}
			return a.unwrap(c.Context(), &t)
		},
	}
	a.transferFlags(c, &t, "NAME=VALUE; exactly the pairs that it was wrapped with")
	return c
}

func (a *app) unwrap(ctx context.Context, t *transfer) error {
	request := &kmsagentv1.UnwrapRequest{}
	var err error
	if request.Context, err = t.context.parse(); err != nil {
		return err
	}
	if request.MaxStale, err = t.stale.value(); err != nil {
		return err
	}
	if request.Wrapped, err = a.readWrapped(ctx, t.in); err != nil {
		return err
	}
	return a.call(ctx, &t.connection, func(ctx context.Context, c *client.Client) error {
		response, err := c.Unwrap(ctx, request)
		if err != nil {
			return err
		}
		defer clear(response.GetPlaintext())
		if t.verbose {
			a.note("unwrapped with %s", keyUse(response.GetKeyUse()))
		}
		return a.writeOutput(ctx, t.out, modeSecret, t.force, response.GetPlaintext())
	})
}

func newRandom(a *app) *cobra.Command {
	f := connection{}
	encoding, out, force := "hex", "", false
	c := &cobra.Command{
		Use:     "random LENGTH",
		Short:   "Print random bytes from the agent",
		Example: "  kms-agent random 32\n  kms-agent random 32 --encoding raw --out seal.key",
		Args:    exactly("LENGTH"),
		RunE: func(c *cobra.Command, args []string) error {
			length, err := strconv.ParseUint(args[0], 10, 32)
			if err != nil || length < 1 || length > maxRandom {
				return usagef("LENGTH must be a number of bytes between 1 and %d", maxRandom)
			}
			encode, err := a.encoder(encoding, out)
			if err != nil {
				return err
			}
			return a.call(c.Context(), &f, func(ctx context.Context, c *client.Client) error {
				response, err := c.GenerateRandom(ctx, &kmsagentv1.GenerateRandomRequest{Length: uint32(length)})
				if err != nil {
					return err
				}
				defer clear(response.GetRandom())
				if a.format == formatJSON {
					return a.printJSON(response)
				}
				return a.writeOutput(ctx, out, modeSecret, force, encode(response.GetRandom()))
			})
		},
	}
	c.Flags().StringVar(&encoding, "encoding", encoding, "hex, base64 or raw")
	c.Flags().VarP(pathFlag{&out}, "out", "o", "write this new file of mode 0600 instead of standard output")
	c.Flags().BoolVar(&force, "force", false, "replace the output file where it exists")
	a.outputFlag(c)
	a.connectionFlags(c, &f)
	return c
}

// encoder writes bytes in one of three ways; text ends with a newline.
func (a *app) encoder(name, out string) (func([]byte) []byte, error) {
	switch name {
	case "hex":
		return func(b []byte) []byte { return append(hex.AppendEncode(nil, b), '\n') }, nil
	case "base64":
		return func(b []byte) []byte { return append(base64.StdEncoding.AppendEncode(nil, b), '\n') }, nil
	case "raw":
		return func(b []byte) []byte { return b }, a.refuseTerminal(out)
	}
	return nil, usagef("--encoding must be hex, base64 or raw, not %q", name)
}
