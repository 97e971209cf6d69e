package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kms-agent/kms-agent/agent"
)

// readyFile appears in the directory of a development agent while it serves.
const readyFile = "ready"

func newDev(a *app) *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "dev",
		Short: "Run a development agent with everything it needs",
		Long: `Runs an agent with an embedded SPIFFE issuer, a local keystore, a key and a policy,
all in one private directory, and prints how to use it. Without --dir the directory
is a new one that is removed at the end. While the agent serves, the file "` + readyFile + `"
stands in the directory.

It is for development: whoever can open a Workload API socket in the directory is
that workload.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error { return a.runDev(c.Context(), dir) },
	}
	c.Flags().StringVar(&dir, "dir", "", "keep everything in this directory (mode 0700) and use it again")
	return c
}

func (a *app) runDev(ctx context.Context, dir string) (err error) {
	if err := harden(); err != nil {
		return err
	}
	if dir == "" {
		if dir, err = os.MkdirTemp("", "kms-agent-dev"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	}
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return usagef("%s is not a directory; name one with --dir, or a new one", dir)
	}
	ready := filepath.Join(dir, readyFile)
	if err := os.Remove(ready); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	defer func() { _ = os.Remove(ready) }()
	logger, level, err := newLogger(agent.LogConfig{Level: agent.LogInfo, Format: agent.LogConsole}, a.errOut)
	if err != nil {
		return err
	}
	return agent.RunDev(ctx, agent.DevOptions{Dir: dir, Logger: logger, Level: level, Ready: func(info agent.DevInfo) {
		_, _ = fmt.Fprint(a.out, devGuide(info))
		if err := os.WriteFile(ready, nil, 0o600); err != nil {
			a.note("%v", err)
		}
	}})
}

// devGuide says how to use a development agent from another shell.
func devGuide(info agent.DevInfo) string {
	var b strings.Builder
	fmt.Fprintf(&b, `A development agent serves in %s. In another shell:

  export KMS_AGENT_SOCKET=%s KMS_AGENT_ADMIN_SOCKET=%s
`, info.Dir, info.Socket, info.AdminSocket)
	for i, name := range slices.Sorted(maps.Keys(info.Workloads)) {
		command := "export"
		if i > 0 {
			command = "# or: export"
		}
		fmt.Fprintf(&b, "  %s SPIFFE_ENDPOINT_SOCKET=unix://%s    # be the workload %q\n", command, info.Workloads[name], name)
	}
	fmt.Fprintf(&b, `
  kms-agent whoami
  kms-agent encrypt --key %s --in FILE --out FILE.enc
  kms-agent decrypt --in FILE.enc
  kms-agent status
  kms-agent audit verify --initial-key %s %s

Ctrl-C ends it.
`, info.Key, info.InitialKey, info.AuditLog)
	return b.String()
}
