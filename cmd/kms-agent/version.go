package main

import (
	"crypto/fips140"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/kms-agent/kms-agent/agent"
	"github.com/kms-agent/kms-agent/plugins"
)

// versionInfo is what version prints.
type versionInfo struct {
	Version  string `json:"version"`
	Revision string `json:"revision"`
	Modified bool   `json:"modified"`
	Time     string `json:"time"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
	// FIPS140 is "off" or the version of Go's cryptographic module in force.
	FIPS140 string `json:"fips140"`
	// FIPS140Build is the module that the program was built with.
	FIPS140Build string `json:"fips140_build"`
	Experiments  string `json:"experiments"`
	CGO          bool   `json:"cgo"`
}

func newVersion(a *app) *cobra.Command {
	c := &cobra.Command{
		Use: "version", Short: "Print the version, how it was built, and the state of the FIPS 140-3 module",
		Args: exactly(),
		RunE: func(*cobra.Command, []string) error {
			v := readVersion()
			return a.print(v, func(t *table) {
				t.row("version", v.Version)
				t.row("revision", orDash(v.Revision))
				t.row("go", v.Go+" "+v.Platform)
				t.row("experiments", orDash(v.Experiments))
				t.row("fips140", v.FIPS140+" (built with "+v.FIPS140Build+")")
			})
		},
	}
	a.outputFlag(c)
	return c
}

func readVersion() versionInfo {
	v := versionInfo{
		Version: agent.Version(), Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		FIPS140: plugins.FIPS140Module(), FIPS140Build: fips140.Version(),
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Revision = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		case "vcs.time":
			v.Time = s.Value
		case "GOEXPERIMENT":
			v.Experiments = s.Value
		case "CGO_ENABLED":
			v.CGO = s.Value == "1"
		}
	}
	return v
}
