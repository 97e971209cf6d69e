package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// replaceTimeout is for what starts a process, or a configuration's worth of them.
const replaceTimeout = 30 * time.Second

// administrate asks the agent for one thing and prints its answer.
func administrate[R proto.Message](a *app, c *cobra.Command, f *adminFlags, timeout time.Duration, ask func(context.Context, adminv1.AdminClient) (R, error), rows func(*table, R)) error {
	socket, err := a.adminSocket(f)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context(), timeout)
	defer cancel()
	return withAdmin(socket, func(client adminv1.AdminClient) error {
		answer, err := ask(ctx, client)
		if err != nil {
			return adminHint(err, socket)
		}
		return a.print(answer, func(t *table) { rows(t, answer) })
	})
}

func newEvict(a *app) *cobra.Command {
	f, all := adminFlags{}, false
	c := &cobra.Command{
		Use: "evict KEY | --all", Short: "Destroy the cached data keys of a key",
		Long: `Destroys the data keys that the agent has cached for a key, or for every key with
--all. Nothing is lost: the next use of each asks the backend, and gets what the
backend then gives. Use it after a key was disabled upstream and even the
revocation window (cache.max_age) is too long to wait.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if (len(args) == 1) == all {
				return usagef("name one key, or --all")
			}
			request := &adminv1.EvictRequest{All: all}
			if len(args) == 1 {
				request.Key = args[0]
			}
			return administrate(a, c, &f, adminTimeout, func(ctx context.Context, admin adminv1.AdminClient) (*adminv1.EvictResponse, error) {
				return admin.Evict(ctx, request)
			}, func(t *table, r *adminv1.EvictResponse) { t.row("evicted", fmt.Sprint(r.GetEvicted())) })
		},
	}
	c.Flags().BoolVar(&all, "all", false, "of every key")
	a.adminFlags(c, &f)
	a.outputFlag(c)
	return c
}

func newReload(a *app) *cobra.Command {
	f := adminFlags{}
	c := &cobra.Command{
		Use: "reload", Short: "Read the configuration again, and say what is wrong with it",
		Long: `Makes the agent read its configuration again, as it does by itself when the file
changes, and waits for the outcome. A configuration with faults changes nothing.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			return administrate(a, c, &f, replaceTimeout, func(ctx context.Context, admin adminv1.AdminClient) (*adminv1.ReloadResponse, error) {
				return admin.Reload(ctx, &adminv1.ReloadRequest{})
			}, func(t *table, r *adminv1.ReloadResponse) { t.row("generation", fmt.Sprint(r.GetGeneration())) })
		},
	}
	a.adminFlags(c, &f)
	a.outputFlag(c)
	return c
}

func newPluginRestart(a *app) *cobra.Command {
	f := adminFlags{}
	c := &cobra.Command{
		Use: "restart BACKEND", Short: "Replace the process of a backend by a new one",
		Long: `Starts a new process of the backend's plugin. It takes over when it works, and
then the old one ends; no call fails for it. When it does not work, the old one
goes on.`,
		Args:              exactly("BACKEND"),
		ValidArgsFunction: a.backendNames(&f),
		RunE: func(c *cobra.Command, args []string) error {
			return administrate(a, c, &f, replaceTimeout, func(ctx context.Context, admin adminv1.AdminClient) (*adminv1.RestartPluginResponse, error) {
				return admin.RestartPlugin(ctx, &adminv1.RestartPluginRequest{Backend: args[0]})
			}, func(t *table, r *adminv1.RestartPluginResponse) { t.row("process", fmt.Sprint(r.GetPid())) })
		},
	}
	a.adminFlags(c, &f)
	a.outputFlag(c)
	return c
}

// backendNames completes names of backends, where an agent answers.
func (a *app) backendNames(f *adminFlags) cobra.CompletionFunc {
	return func(c *cobra.Command, args []string, begun string) (names []string, _ cobra.ShellCompDirective) {
		socket, err := a.adminSocket(f)
		if err != nil || len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(c.Context(), completionTimeout)
		defer cancel()
		status, err := adminStatus(ctx, socket)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		for _, b := range status.GetBackends() {
			if strings.HasPrefix(b.GetName(), begun) {
				names = append(names, b.GetName())
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

func newLogLevel(a *app) *cobra.Command {
	f, lasts := adminFlags{}, time.Duration(0)
	c := &cobra.Command{
		Use: "log-level [LEVEL]", Short: "Change what the running agent logs",
		Long: `Sets the level to debug, info, warn or error, for the time that --for says or
until the configuration says something else. Without a LEVEL the configured one
is back.`,
		Args:      cobra.MaximumNArgs(1),
		ValidArgs: []string{"debug", "info", "warn", "error"},
		RunE: func(c *cobra.Command, args []string) error {
			request := &adminv1.SetLogLevelRequest{}
			if len(args) == 1 {
				request.Level = args[0]
			}
			if c.Flags().Changed("for") {
				request.For = durationpb.New(lasts)
			}
			return administrate(a, c, &f, adminTimeout, func(ctx context.Context, admin adminv1.AdminClient) (*adminv1.SetLogLevelResponse, error) {
				return admin.SetLogLevel(ctx, request)
			}, func(t *table, r *adminv1.SetLogLevelResponse) {
				t.row("before", r.GetPrevious())
				t.row("level", r.GetLevel())
			})
		},
	}
	c.Flags().DurationVar(&lasts, "for", 0, "go back to the configured level after this time, such as 10m")
	a.adminFlags(c, &f)
	a.outputFlag(c)
	return c
}

func newProfile(a *app) *cobra.Command {
	f, out, duration, force := adminFlags{}, "", time.Duration(0), false
	names := []string{"cpu", "trace", "heap", "allocs", "goroutine", "threadcreate", "block", "mutex"}
	c := &cobra.Command{
		Use: "profile NAME", Short: "Take a profile of the running agent",
		Long: `Takes a profile for "go tool pprof", or with trace one for "go tool trace". cpu and
trace need a --duration. Profiles hold names of functions and figures, no data of
callers. They exist on the admin socket only.`,
		Args: exactly("NAME"), ValidArgs: names,
		RunE: func(c *cobra.Command, args []string) error {
			request := &adminv1.ProfileRequest{Name: args[0]}
			if c.Flags().Changed("duration") {
				request.Duration = durationpb.New(duration)
			}
			if (out == "" || out == "-") && isTerminal(a.out) {
				return usagef("a profile is not for a terminal; name a file with --out")
			}
			socket, err := a.adminSocket(&f)
			if err != nil {
				return err
			}
			profile, err := takeProfile(c.Context(), socket, request, duration+adminTimeout)
			if err != nil {
				return adminHint(err, socket)
			}
			return a.writeOutput(c.Context(), out, modeSecret, force, profile)
		},
	}
	c.Flags().DurationVar(&duration, "duration", 0, "how long to look, such as 10s")
	c.Flags().Var(pathFlag{&out}, "out", "the file to write (default: standard output)")
	c.Flags().BoolVar(&force, "force", false, "replace the file")
	a.adminFlags(c, &f)
	return c
}

func takeProfile(ctx context.Context, socket string, request *adminv1.ProfileRequest, timeout time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var profile bytes.Buffer
	err := withAdmin(socket, func(admin adminv1.AdminClient) error {
		stream, err := admin.Profile(ctx, request)
		for err == nil {
			var part *adminv1.ProfileResponse
			if part, err = stream.Recv(); err == nil {
				profile.Write(part.GetData())
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	})
	return profile.Bytes(), err
}
