package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

func newKeysHealth(a *app) *cobra.Command {
	f, days := adminFlags{}, uint32(0)
	c := &cobra.Command{
		Use: "health [KEY]", Short: "Tell which backends the messages of the past days depend on",
		Long: `Asks the agent, on its admin socket, how many messages, exported data keys and
wrapped keys it has made in the past days, and which backends and versions of
wrapping keys can open them. A backend, or a version, may go when nothing that
is still needed depends on it alone: what older messages carry is not counted,
nor what other hosts have made. kms-agent reencrypt moves what does.

Counts are kept by day for 400 days; a crash loses those of a minute.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			socket, err := a.adminSocket(&f)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(c.Context(), adminTimeout)
			defer cancel()
			var health *adminv1.KeysHealthResponse
			err = withAdmin(socket, func(c adminv1.AdminClient) error {
				health, err = c.KeysHealth(ctx, &adminv1.KeysHealthRequest{Key: strings.Join(args, ""), Days: days})
				return err
			})
			if err != nil {
				return adminHint(err, socket)
			}
			if health.GetProblem() != "" {
				a.note("the counts are not complete: " + health.GetProblem())
			}
			return a.print(health, func(t *table) { keysHealthTable(t, health) })
		},
	}
	c.Flags().Uint32Var(&days, "days", 30, "the past days, today among them")
	a.adminFlags(c, &f)
	a.outputFlag(c)
	return c
}

func keysHealthTable(t *table, h *adminv1.KeysHealthResponse) {
	t.header("KEY", "MADE", "COUNT", "OPENED BY", "LAST DAY")
	for _, n := range h.GetCounts() {
		t.row(n.GetKey(), madeWord(n.GetPurpose()), fmt.Sprint(n.GetCount()), wrapsLine(n.GetWraps()), n.GetLastDay())
	}
	for _, line := range dependants(h) {
		t.row(line)
	}
}

func madeWord(purpose string) string {
	switch purpose {
	case "exported":
		return "data keys"
	case "wrap":
		return "wrapped keys"
	}
	return "messages"
}

func wrapsLine(wraps []*adminv1.KeyWrap) string {
	var names []string
	for _, w := range wraps {
		names = append(names, w.GetBackend()+" version "+w.GetVersion())
	}
	return orDash(strings.Join(names, ", or "))
}

// dependants says of each backend how much of what was made it alone can open.
func dependants(h *adminv1.KeysHealthResponse) []string {
	alone := map[string]uint64{}
	for _, n := range h.GetCounts() {
		for _, w := range n.GetWraps() {
			alone[w.GetBackend()] += 0
		}
		if len(n.GetWraps()) == 1 {
			alone[n.GetWraps()[0].GetBackend()] += n.GetCount()
		}
	}
	var lines []string
	for backend, n := range alone {
		if n == 0 {
			lines = append(lines, "nothing of this depends on "+backend+" alone")
			continue
		}
		lines = append(lines, fmt.Sprintf("%d of these only %s can open", n, backend))
	}
	slices.Sort(lines)
	return lines
}
