package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/kms-agent/kms-agent/agent"
	"github.com/kms-agent/kms-agent/plugins/local"
)

// keystoreFlags say which keystore, and what opens it.
type keystoreFlags struct {
	path            string
	seal            sealFlags
	config, backend string
}

// sealFlags name the secret of a seal; exactly one is given.
type sealFlags struct{ keyFile, passphraseFile, credential string }

func (s *sealFlags) flags(c *cobra.Command, prefix, of string) {
	c.Flags().StringVar(&s.keyFile, prefix+"key-file", "", "file with the 32 random bytes that seal "+of)
	c.Flags().StringVar(&s.passphraseFile, prefix+"passphrase-file", "", "file with the passphrase that seals "+of)
	c.Flags().StringVar(&s.credential, prefix+"credential", "", "systemd credential that seals "+of)
}

func (s *sealFlags) given() bool { return *s != sealFlags{} }

// seal makes paths absolute and demands exactly one of the three.
func (s *sealFlags) seal(prefix string) (local.Seal, error) {
	n := 0
	for _, text := range []string{s.keyFile, s.passphraseFile, s.credential} {
		if text != "" {
			n++
		}
	}
	if n != 1 {
		return local.Seal{}, usagef("name exactly one of --%[1]skey-file, --%[1]spassphrase-file and --%[1]scredential", prefix)
	}
	seal := local.Seal{Credential: s.credential}
	var err error
	if seal.KeyFile, err = absolute(s.keyFile); err == nil {
		seal.PassphraseFile, err = absolute(s.passphraseFile)
	}
	return seal, err
}

func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

func (a *app) keystoreFlags(c *cobra.Command, f *keystoreFlags) {
	c.Flags().StringVar(&f.path, "keystore", "", "the keystore file (environment KMS_AGENT_KEYSTORE)")
	f.seal.flags(c, "", "the keystore")
	c.Flags().StringVar(&f.config, "config", "", "take keystore and seal from this configuration")
	c.Flags().StringVar(&f.backend, "backend", "", "which backend of the configuration (needed where several are local)")
}

// resolve finds the keystore's path and seal.
func (a *app) keystore(f *keystoreFlags) (string, local.Seal, error) {
	if f.config != "" {
		if f.path != "" || f.seal.given() {
			return "", local.Seal{}, usagef("--config names keystore and seal; leave the other flags out")
		}
		return keystoreOf(f.config, f.backend)
	}
	path := firstOf(f.path, a.env("KMS_AGENT_KEYSTORE"))
	if path == "" {
		return "", local.Seal{}, usagef("which keystore? Name --keystore and its seal, or --config")
	}
	path, err := absolute(path)
	if err != nil {
		return "", local.Seal{}, err
	}
	seal, err := f.seal.seal("")
	return path, seal, err
}

// keystoreOf reads the settings of a local backend from a configuration.
func keystoreOf(config, backend string) (string, local.Seal, error) {
	cfg, err := agent.LoadConfig(config)
	if err != nil {
		return "", local.Seal{}, err
	}
	var found []agent.BackendConfig
	for _, b := range cfg.Backends {
		if b.Plugin == "local" && (backend == "" || b.Name == backend) {
			found = append(found, b)
		}
	}
	if len(found) != 1 {
		return "", local.Seal{}, usagef("%s has %d local backends that fit; name one with --backend", config, len(found))
	}
	return found[0].Keystore()
}

func (a *app) openKeystore(f *keystoreFlags) (*local.Keystore, error) {
	path, seal, err := a.keystore(f)
	if err != nil {
		return nil, err
	}
	return local.Open(path, seal)
}

// keyInfo is what the local commands print.
type keyInfo struct {
	Name     string           `json:"name"`
	URI      string           `json:"uri"`
	Current  string           `json:"current_version"`
	Versions []keyVersionInfo `json:"versions"`
}

type keyVersionInfo struct {
	Version string    `json:"version"`
	State   string    `json:"state"`
	Created time.Time `json:"created"`
}

func newKeysLocal(a *app) *cobra.Command {
	c := group("local", "Administer the wrapping keys of the built-in backend", `Works on the keystore file itself, whether an agent runs or not; a running agent
sees each change at its next call. Whoever can read the keystore and its seal
holds the keys: only their administrator should.`)
	c.AddCommand(newLocalInit(a), newLocalList(a), newLocalCreate(a), newLocalRotate(a),
		newLocalState(a, "disable", "Make a version refuse to wrap and unwrap until it is enabled again", (*local.Keystore).Disable),
		newLocalState(a, "enable", "Undo disable", (*local.Keystore).Enable),
		newLocalDestroy(a), newLocalReseal(a), newLocalBackup(a), newLocalRestore(a))
	return c
}

// onKeystore makes a command that opens the keystore, acts, and prints the key
// it acted on.
func (a *app) onKeystore(use, short string, args cobra.PositionalArgs, act func(*local.Keystore, []string) error) *cobra.Command {
	f := keystoreFlags{}
	c := &cobra.Command{Use: use, Short: short, Args: args}
	c.RunE = func(_ *cobra.Command, args []string) error {
		ks, err := a.openKeystore(&f)
		if err != nil {
			return err
		}
		defer ks.Close()
		if err := act(ks, args); err != nil {
			return err
		}
		key, err := ks.Key(args[0])
		if err != nil {
			return err
		}
		return a.printKeys([]local.KeyInfo{key})
	}
	a.keystoreFlags(c, &f)
	a.outputFlag(c)
	return c
}

func (a *app) printKeys(keys []local.KeyInfo) error {
	list := []keyInfo{}
	for _, k := range keys {
		info := keyInfo{Name: k.Name, URI: k.URI, Current: k.Current, Versions: []keyVersionInfo{}}
		for _, v := range k.Versions {
			info.Versions = append(info.Versions, keyVersionInfo{v.Version, v.State.String(), v.Created})
		}
		list = append(list, info)
	}
	return a.print(map[string][]keyInfo{"keys": list}, func(t *table) {
		t.header("KEY", "WRAPPING KEY", "VERSION", "STATE", "CREATED")
		for _, k := range list {
			for _, v := range k.Versions {
				version := v.Version
				if v.Version == k.Current {
					version += " (current)"
				}
				t.row(k.Name, k.URI, version, v.State, when(v.Created))
			}
		}
	})
}

// creating is --create-key-file.
type creating bool

func (x *creating) flag(c *cobra.Command, file string) {
	c.Flags().BoolVar((*bool)(x), "create-key-file", false, "make the "+file+" too, of 32 random bytes and mode 0600; keep a copy of it elsewhere")
}

// keyFile makes the key file of a seal, where that was asked for.
func (x creating) keyFile(seal local.Seal, flag string) error {
	switch {
	case !bool(x):
		return nil
	case seal.KeyFile == "":
		return usagef("--create-key-file goes with --%s", flag)
	}
	return local.CreateKeyFile(seal.KeyFile)
}

func newLocalInit(a *app) *cobra.Command {
	f, create := keystoreFlags{}, creating(false)
	c := &cobra.Command{
		Use: "init", Short: "Make an empty keystore", Args: exactly(),
		Example: "  kms-agent keys local init --keystore /var/lib/kms-agent/keystore --key-file /etc/kms-agent/seal.key --create-key-file",
		RunE: func(*cobra.Command, []string) error {
			path, seal, err := a.keystore(&f)
			if err != nil {
				return err
			}
			if err := create.keyFile(seal, "key-file"); err != nil {
				return err
			}
			ks, err := local.Create(path, seal)
			if err != nil {
				return err
			}
			defer ks.Close()
			return a.printKeystore(ks)
		},
	}
	create.flag(c, "key file")
	a.keystoreFlags(c, &f)
	a.outputFlag(c)
	return c
}

// keystoreInfo is what init and restore print.
type keystoreInfo struct {
	Path string `json:"path"`
	ID   string `json:"id"`
	Seal string `json:"seal"`
	Keys int    `json:"keys"`
}

func (a *app) printKeystore(ks *local.Keystore) error {
	info, err := ks.Info()
	if err != nil {
		return err
	}
	k := keystoreInfo{info.Path, info.ID, info.Seal, info.Keys}
	return a.print(k, func(t *table) {
		t.row("keystore", k.Path)
		t.row("id", k.ID)
		t.row("sealed by", k.Seal)
		t.row("keys", fmt.Sprint(k.Keys))
	})
}

func newLocalList(a *app) *cobra.Command {
	f := keystoreFlags{}
	c := &cobra.Command{
		Use: "list", Short: "List keys and their versions", Args: exactly(),
		RunE: func(*cobra.Command, []string) error {
			ks, err := a.openKeystore(&f)
			if err != nil {
				return err
			}
			defer ks.Close()
			keys, err := ks.List()
			if err != nil {
				return err
			}
			return a.printKeys(keys)
		},
	}
	a.keystoreFlags(c, &f)
	a.outputFlag(c)
	return c
}

func newLocalCreate(a *app) *cobra.Command {
	return a.onKeystore("create NAME", "Make a new wrapping key", exactly("NAME"),
		func(ks *local.Keystore, args []string) error { return ks.CreateKey(args[0]) })
}

func newLocalRotate(a *app) *cobra.Command {
	c := a.onKeystore("rotate NAME", "Add a version to a wrapping key, for what is wrapped from now on", exactly("NAME"),
		func(ks *local.Keystore, args []string) error {
			_, err := ks.Rotate(args[0])
			return err
		})
	c.Long = "Adds a version, which wraps from now on. Older versions go on unwrapping what they wrapped."
	return c
}

func newLocalState(a *app, verb, short string, change func(*local.Keystore, string, string) error) *cobra.Command {
	return a.onKeystore(verb+" NAME VERSION", short, exactly("NAME", "VERSION"),
		func(ks *local.Keystore, args []string) error { return change(ks, args[0], args[1]) })
}

func newLocalDestroy(a *app) *cobra.Command {
	var confirm string
	c := a.onKeystore("destroy NAME VERSION", "Erase a disabled version for good, in two steps", exactly("NAME", "VERSION"),
		func(ks *local.Keystore, args []string) error {
			phrase := args[0] + "@" + args[1]
			if confirm != phrase {
				return &codedError{
					code: exitUsage, hint: "repeat the command with --confirm " + phrase,
					err: fmt.Errorf("everything that version %s of %q wrapped will be lost for good, but for backups of the keystore", args[1], args[0]),
				}
			}
			return ks.Destroy(args[0], args[1])
		})
	c.Long = `Erases the key of one version. First disable it, and see for a while that nothing
needs it any more; then destroy it with --confirm NAME@VERSION. What it wrapped can
then be opened by no one, except through a backup of the keystore.`
	c.Flags().StringVar(&confirm, "confirm", "", "NAME@VERSION, to say that it is meant")
	return c
}

func newLocalReseal(a *app) *cobra.Command {
	f, seal, create := keystoreFlags{}, sealFlags{}, creating(false)
	c := &cobra.Command{
		Use: "reseal", Short: "Put the keystore under another seal", Args: exactly(),
		Long: `Seals the keystore by another secret. Change the configuration of the backend to
the new seal right after it: until then the agent cannot open the keystore.
Copies and backups made before stay under the old seal.`,
		RunE: func(*cobra.Command, []string) error {
			next, err := seal.seal("new-")
			if err != nil {
				return err
			}
			ks, err := a.openKeystore(&f)
			if err != nil {
				return err
			}
			defer ks.Close()
			if err := create.keyFile(next, "new-key-file"); err != nil {
				return err
			}
			resealed, err := ks.Reseal(next)
			if err != nil {
				return err
			}
			defer resealed.Close()
			return a.printKeystore(resealed)
		},
	}
	seal.flags(c, "new-", "the keystore from now on")
	create.flag(c, "new key file")
	a.keystoreFlags(c, &f)
	a.outputFlag(c)
	return c
}

func newLocalBackup(a *app) *cobra.Command {
	f, seal, out, create := keystoreFlags{}, sealFlags{}, "", creating(false)
	c := &cobra.Command{
		Use: "backup --out FILE", Short: "Write the whole keystore as one sealed file", Args: exactly(),
		Long: `Writes every key and version to a new file, sealed by a secret of its own: the
host that holds the keystore's seal may be what is lost.`,
		RunE: func(*cobra.Command, []string) error {
			if out == "" {
				return usagef("where to? Name a new file with --out")
			}
			backup, err := seal.seal("backup-")
			if err != nil {
				return err
			}
			ks, err := a.openKeystore(&f)
			if err != nil {
				return err
			}
			defer ks.Close()
			if out, err = absolute(out); err != nil {
				return err
			}
			if err := create.keyFile(backup, "backup-key-file"); err != nil {
				return err
			}
			if err := ks.BackupFile(out, backup); err != nil {
				return err
			}
			return a.printKeystore(ks)
		},
	}
	c.Flags().VarP(pathFlag{&out}, "out", "o", "the backup's new file")
	seal.flags(c, "backup-", "the backup")
	create.flag(c, "backup's key file")
	a.keystoreFlags(c, &f)
	a.outputFlag(c)
	return c
}

func newLocalRestore(a *app) *cobra.Command {
	f, seal, in, merge, create := keystoreFlags{}, sealFlags{}, "", false, creating(false)
	c := &cobra.Command{
		Use: "restore --in FILE", Short: "Make a keystore from a backup", Args: exactly(),
		Long: `Makes a new keystore from a backup; it never replaces one. With --merge it adds to
an existing keystore the keys and versions that this has not.`,
		RunE: func(*cobra.Command, []string) error {
			if in == "" {
				return usagef("which backup? Name it with --in")
			}
			if merge && bool(create) {
				return usagef("--create-key-file is for a new keystore, not for --merge")
			}
			backup, err := seal.seal("backup-")
			if err != nil {
				return err
			}
			ks, err := a.restore(&f, in, backup, merge, create)
			if err != nil {
				return err
			}
			defer ks.Close()
			return a.printKeystore(ks)
		},
	}
	c.Flags().VarP(pathFlag{&in}, "in", "i", "the backup")
	c.Flags().BoolVar(&merge, "merge", false, "add to an existing keystore what it has not")
	seal.flags(c, "backup-", "the backup")
	create.flag(c, "new keystore's key file")
	a.keystoreFlags(c, &f)
	a.outputFlag(c)
	return c
}

func (a *app) restore(f *keystoreFlags, in string, backup local.Seal, merge bool, create creating) (*local.Keystore, error) {
	path, seal, err := a.keystore(f)
	if err != nil {
		return nil, err
	}
	file, err := os.Open(in)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	if !merge {
		if err := create.keyFile(seal, "key-file"); err != nil {
			return nil, err
		}
		return local.Restore(file, backup, path, seal)
	}
	ks, err := local.Open(path, seal)
	if err != nil {
		return nil, err
	}
	report, err := ks.Merge(file, backup)
	if err != nil {
		ks.Close()
		return nil, err
	}
	a.note("%d versions added, %d left as they are", len(report.Added), len(report.Kept))
	return ks, nil
}
