package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// hsmPlugin is the program of the PKCS#11 backend.
const hsmPlugin = "kms-agent-pkcs11"

// hsmFlags say which token is meant.
type hsmFlags struct {
	config, backend                                    string
	plugin, module, moduleConfig, token, pin, stateDir string
	pinFD                                              int
	retryPIN                                           bool
}

// hsmRequest and hsmAnswer are what kms-agent and the plugin's administer say to
// each other.
type hsmRequest struct {
	Settings json.RawMessage `json:"settings"`
	Command  string          `json:"command"`
	Key      string          `json:"key,omitempty"`
	Version  uint32          `json:"version,omitempty"`
	Suite    string          `json:"suite,omitempty"`
	RetryPIN bool            `json:"retry_pin,omitempty"`
	// ByFlags: no configuration has the settings, and the plugin has the environment of
	// this process.
	ByFlags bool `json:"by_flags,omitempty"`
	// Confirmed lets the current version be disabled.
	Confirmed bool `json:"confirmed,omitempty"`
	// WrappingKeys are the keys' URIs, for check.
	WrappingKeys []string `json:"wrapping_keys,omitempty"`
}

type hsmAnswer struct {
	Error string    `json:"error"`
	Class string    `json:"class"`
	Probe *hsmProbe `json:"probe"`
	Keys  []hsmKey  `json:"keys"`
	// Faults are what check found.
	Faults []hsmFault `json:"faults"`
}

// hsmFault is what is wrong with a setting of a backend, or with the URI of a key.
type hsmFault struct {
	Setting     string `json:"setting"`
	WrappingKey string `json:"wrapping_key"`
	Message     string `json:"message"`
	Warning     bool   `json:"warning"`
}

type hsmProbe struct {
	Module       string     `json:"module"`
	Library      string     `json:"library"`
	Manufacturer string     `json:"manufacturer"`
	Cryptoki     string     `json:"cryptoki"`
	Token        string     `json:"token"`
	Model        string     `json:"model"`
	Serial       string     `json:"serial"`
	Firmware     string     `json:"firmware"`
	Slot         uint       `json:"slot"`
	Sessions     int        `json:"sessions"`
	MaxSessions  uint       `json:"max_sessions"`
	Mechanisms   int        `json:"mechanisms"`
	Suites       []hsmTrial `json:"suites"`
	// Use is the suite that new keys get, and Why says why.
	Use string `json:"use"`
	Why string `json:"why"`
	// Random is what random.backend could use.
	Random hsmRandom `json:"random"`
}

type hsmRandom struct {
	Works  bool   `json:"works"`
	Reason string `json:"reason,omitempty"`
}

type hsmTrial struct {
	Suite string `json:"suite"`
	// Mechanisms are those of the token that the suite uses.
	Mechanisms []string `json:"mechanisms"`

	Works  bool   `json:"works"`
	IV     string `json:"iv,omitempty"`
	PairUS int64  `json:"pair_us,omitempty"`
	// RSABits is the size of RSA keys, Signs says that the token makes none that
	// decrypt and cannot sign, OnToken that it makes none for a session only.
	RSABits int    `json:"rsa_bits,omitempty"`
	Signs   bool   `json:"signs,omitempty"`
	OnToken bool   `json:"on_token,omitempty"`
	Reason  string `json:"reason,omitempty"`
}

type hsmKey struct {
	Key      string       `json:"key"`
	Current  uint32       `json:"current"`
	Versions []hsmVersion `json:"versions"`
}

type hsmVersion struct {
	Version uint32    `json:"version"`
	State   string    `json:"state"`
	Suite   string    `json:"suite"`
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	// Problem says why the version cannot be used, or not in full, though its state lets it.
	Problem string `json:"problem,omitempty"`
	// Wraps are told by list alone, of versions that may make no more than so many.
	Wraps *hsmWear `json:"wraps,omitempty"`
}

// hsmWear is what a version has made, at most, of the wraps that it may make on this host.
type hsmWear struct {
	Used  uint64 `json:"used"`
	Limit uint64 `json:"limit"`
}

// told says what an operator should know of a version that is well or is not, "" if nothing.
func (v hsmVersion) told() string {
	var notes []string
	if v.Problem != "" {
		notes = append(notes, "problem: "+v.Problem)
	}
	if w := v.Wraps; w != nil && w.Used >= w.Limit/2 {
		notes = append(notes, fmt.Sprintf("%d of its %d wraps on this host are made: rotate the key", w.Used, w.Limit))
	}
	return strings.Join(notes, "; ")
}

func newHSM(a *app) *cobra.Command {
	c := group("hsm", "Look at an HSM, and administer the keys on it",
		`Administers keys inside a PKCS#11 token, in the token itself: no agent need run, and
one that runs sees the change within seconds. Run it as the agent's user, on a host
whose configuration has the backend; or name module, token and PIN for a first look.

docs/hsm.md leads from a vendor's library and a PIN to production.`)
	c.AddCommand(newHSMProbe(a), newHSMList(a))
	var suite string
	create := a.onToken("init-key NAME", "Make a key on the token", "init-key", exactly("NAME"), func(r *hsmRequest, _ []string) error {
		r.Suite = suite
		return nil
	})
	create.Long = "Makes a key that never leaves the token, with its first version. The suite is the first\nthat works on this token unless --suite names one; kms-agent hsm probe shows them."
	suites := []string{"aes-gcm", "aes-kwp", "aes-cbc-hmac", "rsa-oaep-sha256", "rsa-oaep-sha1"}
	create.Flags().StringVar(&suite, "suite", "", "how it wraps: "+strings.Join(suites[:4], ", ")+" or "+suites[4])
	_ = create.RegisterFlagCompletionFunc("suite", cobra.FixedCompletions(suites, cobra.ShellCompDirectiveNoFileComp)) // fails for a second one only
	rotate := a.onToken("rotate NAME", "Add a version to a key, for what is wrapped from now on", "rotate", exactly("NAME"), nil)
	c.AddCommand(create, rotate, newHSMDisable(a),
		a.onToken("enable NAME VERSION", "Let a disabled version work again", "enable", exactly("NAME", "VERSION"), nil),
		newHSMDestroy(a))
	return c
}

func newHSMProbe(a *app) *cobra.Command {
	f := hsmFlags{}
	c := &cobra.Command{
		Use: "probe", Short: "Show what a token can do, by trying it", Args: exactly(),
		Long: `Shows module and token, and tries each way of wrapping with keys that exist for the
length of a session: what a token claims proves nothing. Where a token makes no such
keys, each trial has one on the token, labelled kmsagent/trial, and destroys it. Nothing
else changes on the token.

Each PIN is tried once until the token accepts it, so that no token is locked;
--retry-pin lets one be tried again that was refused.`,
		Example: "  kms-agent hsm probe\n  kms-agent hsm probe --module /usr/lib/softhsm/libsofthsm2.so --token pkcs11:token=kms --pin-file pin --state-dir state",
		RunE: func(c *cobra.Command, _ []string) error {
			answer, err := a.askToken(c, &f, hsmRequest{Command: "probe"})
			if err != nil {
				return err
			}
			if answer.Probe == nil {
				return &codedError{code: exitFailure, err: errors.New("the plugin answered something else than a probe: agent and plugin are of different releases")}
			}
			return a.print(answer.Probe, func(t *table) { probeTable(t, answer.Probe) })
		},
	}
	c.Flags().BoolVar(&f.retryPIN, "retry-pin", false, "try the PIN even if the token has refused it before")
	a.hsmFlags(c, &f)
	a.outputFlag(c)
	return c
}

func probeTable(t *table, p *hsmProbe) {
	t.row("module", p.Module)
	t.row("library", fmt.Sprintf("%s, %s, PKCS#11 %s", p.Manufacturer, p.Library, p.Cryptoki))
	t.row("token", fmt.Sprintf("%s, %s, serial %s, firmware %s, slot %d", p.Token, p.Model, p.Serial, p.Firmware, p.Slot))
	most := "no limit told"
	if p.MaxSessions != 0 {
		most = fmt.Sprintf("%d at most", p.MaxSessions)
	}
	t.row("sessions", fmt.Sprintf("%d used, %s", p.Sessions, most))
	t.row("mechanisms", strconv.Itoa(p.Mechanisms))
	for _, s := range p.Suites {
		line := s.outcome()
		if s.Works && s.Suite != p.Use {
			line += "; only for keys made with --suite " + s.Suite
		}
		t.row(s.Suite, strings.Join(s.Mechanisms, ", ")+": "+line)
	}
	random := "works: random.backend may name this backend"
	if !p.Random.Works {
		random = "no: " + p.Random.Reason
	}
	t.row("random", random)
	if p.Use == "" {
		t.row("new keys", "cannot be made without --suite: none of the suites works that are taken by themselves")
		return
	}
	t.row("new keys", fmt.Sprintf("use %s: %s", p.Use, p.Why))
}

// outcome says how a suite did, in a line.
func (s hsmTrial) outcome() string {
	if !s.Works {
		return "no: " + s.Reason
	}
	line := "works"
	if s.IV != "" {
		line += ", initialization vectors by " + s.IV
	}
	if s.RSABits != 0 {
		line += fmt.Sprintf(", RSA of %d bits", s.RSABits)
	}
	if s.Signs {
		line += ", private keys may sign too"
	}
	if s.OnToken {
		line += ", tried with a key on the token, since destroyed"
	}
	return line + fmt.Sprintf(", wrap and unwrap in %v", time.Duration(s.PairUS)*time.Microsecond)
}

func newHSMList(a *app) *cobra.Command {
	f := hsmFlags{}
	c := &cobra.Command{
		Use: "list", Short: "List the keys on a token and their versions", Args: exactly(),
		Long: `Lists the keys that kms-agent made on the token, with their versions, and says what is
wrong with these: somebody has deleted or replaced one, or it may not wrap any more.
Versions that may wrap a limited number of times have how many they have made on this
host, at most, in the JSON as wraps, and in the table once it is half of the limit.

Where the token cannot be asked, nothing is listed, and the exit code says so.`,
		RunE: func(c *cobra.Command, _ []string) error {
			answer, err := a.askToken(c, &f, hsmRequest{Command: "list"})
			if err != nil {
				return err
			}
			if len(answer.Keys) == 0 {
				_, _ = fmt.Fprintln(a.errOut, "there are no keys of kms-agent on this token; kms-agent hsm init-key NAME makes one")
			}
			return a.printHSMKeys(answer.Keys)
		},
	}
	a.hsmFlags(c, &f)
	a.outputFlag(c)
	return c
}

func (a *app) printHSMKeys(keys []hsmKey) error {
	if keys == nil {
		keys = []hsmKey{}
	}
	return a.print(keys, func(t *table) {
		t.header("KEY", "VERSION", "STATE", "SUITE", "CREATED", "ID")
		for _, k := range keys {
			for _, v := range k.Versions {
				name := strconv.FormatUint(uint64(v.Version), 10)
				if v.Version == k.Current {
					name += " (current)"
				}
				cells := []string{k.Key, name, v.State, v.Suite, v.Created.UTC().Format(time.RFC3339), v.ID}
				if note := v.told(); note != "" {
					cells = append(cells, note)
				}
				t.row(cells...)
			}
		}
	})
}

func newHSMDisable(a *app) *cobra.Command {
	var confirm string
	c := a.onToken("disable NAME VERSION", "Keep a version from wrapping and unwrapping", "disable", exactly("NAME", "VERSION"),
		func(r *hsmRequest, args []string) error {
			phrase := args[0] + "@" + args[1]
			if confirm != "" && confirm != phrase {
				return usagef("--confirm %s does not mean what is disabled; that would be %s", confirm, phrase)
			}
			r.Confirmed = confirm != ""
			return nil
		})
	c.Long = `Keeps a version from wrapping and unwrapping. Agents go on using data keys that they
have in memory, for cache.max_age at most; kms-agent evict NAME ends that at once.

Encryption needs the current version: make another first with kms-agent hsm rotate, or
say with --confirm NAME@VERSION that nothing is to be encrypted any more.`
	c.Flags().StringVar(&confirm, "confirm", "", "NAME@VERSION, to disable the current version too")
	return c
}

func newHSMDestroy(a *app) *cobra.Command {
	var confirm string
	var c *cobra.Command
	c = a.onToken("destroy NAME VERSION", "Destroy a disabled version for good, in two steps", "destroy", exactly("NAME", "VERSION"),
		func(_ *hsmRequest, args []string) error {
			phrase := args[0] + "@" + args[1]
			if confirm == phrase {
				return nil
			}
			return &codedError{
				code: exitUsage,
				hint: fmt.Sprintf("only a disabled version is destroyed: %s disables it; see for a while that nothing misses it, then repeat the command with --confirm %s",
					sameToken(c, "disable "+args[0]+" "+args[1]), phrase),
				err: fmt.Errorf("everything that version %s of %q wrapped will be lost for good, but for the HSM's own backups", args[1], args[0]),
			}
		})
	c.Long = `Destroys the key of one version on the token. First disable it, and see for a while
that nothing needs it any more; then destroy it with --confirm NAME@VERSION.`
	c.Flags().StringVar(&confirm, "confirm", "", "NAME@VERSION, to say that it is meant")
	return c
}

// onToken is a command that changes a key; prepare may refuse and add to the request.
func (a *app) onToken(use, short, command string, args cobra.PositionalArgs, prepare func(*hsmRequest, []string) error) *cobra.Command {
	f := hsmFlags{}
	c := &cobra.Command{
		Use: use, Short: short, Args: args,
		RunE: func(c *cobra.Command, args []string) error {
			r := hsmRequest{Command: command, Key: args[0]}
			if len(args) > 1 {
				n, err := strconv.ParseUint(args[1], 10, 32)
				if err != nil || n == 0 {
					return usagef("%q is no version: versions are numbers from 1", args[1])
				}
				r.Version = uint32(n)
			}
			if prepare != nil {
				if err := prepare(&r, args); err != nil {
					return err
				}
			}
			answer, err := a.askToken(c, &f, r)
			if err != nil {
				return err
			}
			return a.printHSMKeys(answer.Keys)
		},
	}
	a.hsmFlags(c, &f)
	a.outputFlag(c)
	return c
}

func (a *app) hsmFlags(c *cobra.Command, f *hsmFlags) {
	flags := c.Flags()
	flags.StringVar(&f.config, "config", defaultConfigPath, "configuration that has the backend")
	flags.StringVar(&f.backend, "backend", "", "name of the backend, where the configuration has several")
	flags.StringVar(&f.module, "module", "", "without a configuration: the vendor's PKCS#11 library")
	flags.StringVar(&f.moduleConfig, "module-config", "", "... what the library is started with, mostly nothing")
	flags.StringVar(&f.token, "token", "", "... the token, such as pkcs11:token=kms")
	flags.StringVar(&f.pin, "pin-file", "", "... the file that holds the PIN")
	flags.IntVar(&f.pinFD, "pin-fd", noPINFD, "read the PIN from this open descriptor instead, a file or a pipe: --pin-fd 3 3< <(command)")
	flags.StringVar(&f.stateDir, "state-dir", "", "... the directory that remembers which PINs were tried")
	flags.StringVar(&f.plugin, "plugin", "", "... the plugin's program ("+hsmPlugin+" beside kms-agent)")
	// These fail for a second one only.
	_ = c.MarkFlagDirname("state-dir")
	_ = c.RegisterFlagCompletionFunc("backend", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return hsmBackends(f.config), cobra.ShellCompDirectiveNoFileComp
	})
	for _, name := range []string{"token", "module-config", "pin-fd"} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
}
