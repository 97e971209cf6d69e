package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/kms-agent/kms-agent/agent"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/local"
)

func newPlugin(a *app) *cobra.Command {
	c := group("plugin", "Show the backends' plugins, and replace their processes", "")
	c.AddCommand(newPluginList(a), newPluginRestart(a), newPluginServe())
	return c
}

// newPluginServe is how the agent runs the plugins inside its own binary.
func newPluginServe() *cobra.Command {
	return &cobra.Command{
		Use: "serve NAME", Short: "Be a built-in plugin; the agent starts this", Hidden: true, Args: exactly("NAME"),
		RunE: func(_ *cobra.Command, args []string) error {
			if args[0] != "local" {
				return usagef("there is no built-in plugin %q; there is: local", args[0])
			}
			return plugins.Serve(local.New())
		},
	}
}

// pluginList is what plugin list prints. Without a reachable agent it holds
// what the configuration says, and states are empty.
type pluginList struct {
	// Source is "agent" or "configuration".
	Source   string        `json:"source"`
	Backends []pluginState `json:"backends"`
}

type pluginState struct {
	Name      string `json:"name"`
	Plugin    string `json:"plugin"`
	Version   string `json:"version"`
	State     string `json:"state"`
	PID       int32  `json:"pid"`
	Restarts  uint64 `json:"restarts"`
	Confined  bool   `json:"confined"`
	FIPS140   string `json:"fips140"`
	SHA256    string `json:"sha256"`
	LastError string `json:"last_error"`
}

func newPluginList(a *app) *cobra.Command {
	f := adminFlags{}
	c := &cobra.Command{
		Use: "list", Short: "List the configured plugins and their state",
		Long: `Lists the plugins as the agent's admin socket tells them. Where no agent can be
reached and --config names a configuration, that is listed instead, without states.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := a.listPlugins(c, &f)
			if err != nil {
				return err
			}
			return a.print(list, list.table)
		},
	}
	a.adminFlags(c, &f)
	a.outputFlag(c)
	return c
}

func (a *app) listPlugins(c *cobra.Command, f *adminFlags) (*pluginList, error) {
	socket, err := a.adminSocket(f)
	if err != nil {
		return nil, err
	}
	response, err := adminStatus(c.Context(), socket)
	if err == nil {
		return pluginsOf(response), nil
	}
	if f.config == "" {
		hinted := adminHint(err, socket)
		var coded *codedError
		if errors.As(hinted, &coded) {
			coded.hint += "; --config FILE lists what is configured"
		}
		return nil, hinted
	}
	cfg, loadErr := agent.LoadConfig(f.config)
	if loadErr != nil {
		return nil, loadErr
	}
	a.note("the agent cannot be asked (%s); this is what %s says", classify(err).message, f.config)
	list := &pluginList{Source: "configuration"}
	for _, b := range cfg.Backends {
		list.Backends = append(list.Backends, pluginState{Name: b.Name, Plugin: b.Plugin + b.Path, SHA256: b.SHA256})
	}
	return list, nil
}

func pluginsOf(r *adminv1.StatusResponse) *pluginList {
	list := &pluginList{Source: "agent"}
	for _, b := range r.GetBackends() {
		list.Backends = append(list.Backends, pluginState{
			Name: b.GetName(), Plugin: b.GetPlugin(), Version: b.GetPluginVersion(), State: b.GetState(), PID: b.GetPid(),
			Restarts: b.GetRestarts(), Confined: b.GetConfined(), FIPS140: b.GetFips140(), SHA256: b.GetSha256(), LastError: b.GetLastError(),
		})
	}
	return list
}

func (l *pluginList) table(t *table) {
	t.header("BACKEND", "PLUGIN", "VERSION", "STATE", "PID", "RESTARTS", "CONFINED", "FIPS140", "LAST ERROR")
	for _, b := range l.Backends {
		t.row(b.Name, b.Plugin, orDash(b.Version), orDash(b.State), fmt.Sprint(b.PID), fmt.Sprint(b.Restarts),
			yesNo(b.Confined), orDash(b.FIPS140), orDash(b.LastError))
	}
}

func yesNo(yes bool) string {
	if yes {
		return "yes"
	}
	return "no"
}
