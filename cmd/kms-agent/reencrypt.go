package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// maxUnary bounds a message for the calls that are not streams: 1 MiB of
// plaintext, and what the format adds.
const maxUnary = 2 << 20

func newReencrypt(a *app) *cobra.Command {
	t := transfer{}
	var newContext pairs
	var key string
	var clearContext bool
	c := &cobra.Command{
		Use:   "reencrypt",
		Short: "Make a new message of an old one, inside the agent",
		Long: `Opens a message and encrypts its plaintext anew, under another key, another
context or the newest version of its key; the plaintext never leaves the agent.
It needs decrypt on the old key and encrypt on the new one. Messages of more than
1 MiB go through decrypt and encrypt.`,
		Example: "  kms-agent reencrypt --to-key archive --in old.enc --out new.enc",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			destination, err := newContext.parse()
			if err != nil {
				return err
			}
			if clearContext && len(destination) > 0 {
				return usagef("--clear-context and --new-context exclude each other")
			}
			if err := a.refuseTerminal(t.out); err != nil {
				return err
			}
			return a.reencrypt(c.Context(), &t, &kmsagentv1.ReEncryptRequest{
				DestinationKey: key, DestinationContext: destination, ReplaceContext: clearContext || len(destination) > 0,
			})
		},
	}
	c.Flags().StringVar(&key, "to-key", "", "key of the new message (without it: the old one's)")
	newContext.flag(c, "new-context", "", "NAME=VALUE of the new message's context, instead of the old one's; may be repeated")
	c.Flags().BoolVar(&clearContext, "clear-context", false, "give the new message no context")
	a.transferFlags(c, &t, "NAME=VALUE that must stand in the old message's context; may be repeated")
	return c
}

func (a *app) reencrypt(ctx context.Context, t *transfer, request *kmsagentv1.ReEncryptRequest) error {
	var err error
	if request.ExpectedContext, err = t.context.parse(); err != nil {
		return err
	}
	if request.MaxStale, err = t.stale.value(); err != nil {
		return err
	}
	if request.Message, err = a.readInput(ctx, t.in, maxUnary, "the message"); err != nil {
		return err
	}
	return a.call(ctx, &t.connection, func(ctx context.Context, c *client.Client) error {
		response, err := c.ReEncrypt(ctx, request)
		if err != nil {
			return err
		}
		if t.verbose {
			a.note("from %s; to %s", keyUse(response.GetSource()), keyUse(response.GetDestination()))
		}
		return a.writeOutput(ctx, t.out, modePublic, t.force, response.GetMessage())
	})
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
