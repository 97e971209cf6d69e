package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// pageSize is how many keys are asked for at a time: the most there is.
const pageSize = 1000

func newKeys(a *app) *cobra.Command {
	c := group("keys", "List and describe keys; administer the local backend's", "")
	c.AddCommand(newKeysList(a), newKeysDescribe(a), newKeysHealth(a), newKeysLocal(a))
	return c
}

func newKeysList(a *app) *cobra.Command {
	f := connection{}
	c := &cobra.Command{
		Use: "list", Short: "List the keys that you may describe", Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c.Context(), &f, func(ctx context.Context, c *client.Client) error {
				all, err := listKeys(ctx, c)
				if err != nil {
					return err
				}
				if len(all.GetKeys()) == 0 {
					a.note("policy lets you describe no key; kms-agent whoami shows who you are")
				}
				return a.print(all, func(t *table) {
					t.header("KEY", "VERSION", "OPERATIONS", "LABELS")
					for _, k := range all.GetKeys() {
						t.row(k.GetName(), orDash(k.GetCurrentVersion()), orDash(strings.Join(k.GetOperations(), ",")), contextLine(k.GetLabels()))
					}
				})
			})
		},
	}
	a.outputFlag(c)
	a.connectionFlags(c, &f)
	return c
}

// listKeys gathers every page.
func listKeys(ctx context.Context, c *client.Client) (*kmsagentv1.ListKeysResponse, error) {
	all := &kmsagentv1.ListKeysResponse{}
	request := &kmsagentv1.ListKeysRequest{PageSize: pageSize}
	for {
		page, err := c.ListKeys(ctx, request)
		if err != nil {
			return nil, err
		}
		all.Keys = append(all.Keys, page.GetKeys()...)
		if page.GetNextPageToken() == "" {
			return all, nil
		}
		if page.GetNextPageToken() == request.GetPageToken() {
			return nil, fmt.Errorf("the agent's list of keys does not end")
		}
		request.PageToken = page.GetNextPageToken()
	}
}

func newKeysDescribe(a *app) *cobra.Command {
	f := connection{}
	c := &cobra.Command{
		Use: "describe KEY", Short: "Describe one key", Args: exactly("KEY"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c.Context(), &f, func(ctx context.Context, c *client.Client) error {
				response, err := c.DescribeKey(ctx, &kmsagentv1.DescribeKeyRequest{Key: args[0]})
				if err != nil {
					return err
				}
				return a.print(response.GetKey(), func(t *table) { keyTable(t, response.GetKey()) })
			})
		},
	}
	a.outputFlag(c)
	a.connectionFlags(c, &f)
	return c
}

func keyTable(t *table, k *kmsagentv1.Key) {
	t.row("key", k.GetName())
	t.row("former names", orDash(strings.Join(k.GetFormerNames(), ", ")))
	t.row("labels", contextLine(k.GetLabels()))
	t.row("operations", orDash(strings.Join(k.GetOperations(), ", ")))
	t.row("binds context", fmt.Sprint(k.GetBindContext()))
	t.row("max age", k.GetMaxAge().AsDuration().String())
	t.row("version", orDash(k.GetCurrentVersion()))
	for _, v := range k.GetVersions() {
		state := strings.ToLower(strings.TrimPrefix(v.GetState().String(), "STATE_"))
		t.row("", fmt.Sprintf("%s %s, created %s", v.GetVersion(), state, when(v.GetCreated().AsTime())))
	}
}

func newWhoami(a *app) *cobra.Command {
	f := connection{}
	c := &cobra.Command{
		Use: "whoami", Short: "Show who the agent takes you for, and how that was proven", Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c.Context(), &f, func(ctx context.Context, c *client.Client) error {
				r, err := c.WhoAmI(ctx)
				if err != nil {
					return err
				}
				return a.print(r, func(t *table) {
					t.row("SPIFFE ID", r.GetSpiffeId())
					t.row("proof", r.GetProof())
					if r.GetExpires() != nil {
						t.row("expires", when(r.GetExpires().AsTime()))
					}
					t.row("process", fmt.Sprintf("pid %d, uid %d, gid %d", r.GetPid(), r.GetUid(), r.GetGid()))
				})
			})
		},
	}
	a.outputFlag(c)
	a.connectionFlags(c, &f)
	return c
}
