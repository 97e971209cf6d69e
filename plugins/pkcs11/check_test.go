package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// What can be known before an agent starts is told, without loading the library.
func TestCheck(t *testing.T) {
	r := newTalkative(t)
	t.Setenv("VENDOR_HANGS", "1") // who loads it does not come back
	good := r.settings["module"]
	empty, notes := r.Path("empty"), r.Path("notes")
	r.Write("empty", "")
	r.Write("notes", "no library")
	for _, c := range []struct {
		setting string
		value   any
		key     string
		want    string // setting or key, and a part of the message
		warning bool
	}{
		{setting: "sessions", value: 4},
		{setting: "module", value: "/usr/lib/missing.so", want: "module: /usr/lib/missing.so does not exist"},
		{setting: "module", value: notes, want: "module: " + notes + " is no shared library"},
		{setting: "module", value: "/proc/self/exe", want: "module: /proc/self/exe exports no"},
		{setting: "token", value: "kms", want: `token: "kms" is no PKCS#11 URI, such as pkcs11:token=kms`},
		{setting: "unknown", value: 1, want: "unknown: there is no such setting"},
		{setting: "pin", value: hsmtest.PIN, want: "pin: the PIN itself does not belong into the configuration"},
		{setting: "pin_file", value: empty, want: "pin_file: the PIN is empty: " + empty, warning: true},
		{setting: "pin_file", value: r.Path("missing"), want: "pin_file: the PIN: open", warning: true},
		{key: "pkcs11:token=kms", want: "pkcs11:token=kms: the URI"},
		{key: "pkcs11:token=other;object=orders", want: "pkcs11:token=other;object=orders: names the token"},
		{
			setting: "token", value: "pkcs11:token=kms;serial=1", key: "pkcs11:token=kms;serial=2;object=orders",
			want: "pkcs11:token=kms;serial=2;object=orders: names the token with serial",
		},
		{setting: "token", value: "pkcs11:serial=1"},
		{setting: "fleet_size", value: 0, want: "fleet_size: 1 to 1000000"},
	} {
		before := r.settings[c.setting]
		if c.setting != "" {
			r.settings[c.setting] = c.value
		}
		q := request{Command: "check", WrappingKeys: []string{"pkcs11:token=kms;object=orders"}}
		if c.key != "" {
			q.WrappingKeys = []string{c.key}
		}
		faults := r.must(q).Faults
		switch {
		case c.want == "" && len(faults) == 0:
		case c.want == "" || len(faults) != 1:
			t.Errorf("%s = %v: %+v, want %q", c.setting, c.value, faults, c.want)
		default:
			f := faults[0]
			if got := f.Setting + f.WrappingKey + ": " + f.Message; !strings.HasPrefix(got, c.want) || f.Warning != c.warning {
				t.Errorf("%s = %v: %q, warning %v, want %q", c.setting, c.value, got, f.Warning, c.want)
			}
		}
		if delete(r.settings, c.setting); before != nil {
			r.settings[c.setting] = before
		}
	}
	if r.settings["module"] != good {
		t.Fatal("the settings are not as they were")
	}
}

// A PIN's file that this user may not read is told with the cure; other faults have none
// of that.
func TestCureOfAnUnreadablePIN(t *testing.T) {
	s := settings{PINFile: "/etc/kms-agent/hsm/pin"}
	denied := fmt.Errorf("the PIN: %w", &fs.PathError{Op: "open", Path: s.PINFile, Err: unix.EACCES})
	want := fmt.Sprintf("chown %d %s, chmod 400 it", os.Geteuid(), s.PINFile)
	if got := s.withPINCure(denied).Error(); !strings.HasPrefix(got, denied.Error()) || !strings.Contains(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	missing := fmt.Errorf("the PIN: %w", fs.ErrNotExist)
	if got := s.withPINCure(missing); !errors.Is(got, missing) || got.Error() != missing.Error() {
		t.Errorf("%q, want %q", got, missing)
	}
	if got := (settings{PINCred: "pin"}).withPINCure(denied); got.Error() != denied.Error() {
		t.Errorf("of a credential: %q, want %q", got, denied)
	}
}

// Damaged counts of wraps are a fault, with the cure; those that are not there are none.
func TestCheckOfCounts(t *testing.T) {
	r := newRig(t)
	dir := r.settings["state_dir"]
	q := request{Command: "check", WrappingKeys: []string{"pkcs11:token=kms;object=orders"}}
	for content, damaged := range map[string]bool{"": false, `{"format":1,"wraps":{"00112233445566778899aabbccddeeff":4}}`: false, "{": true, `[]`: true} {
		if content != "" {
			r.Write("state/wraps.json", content)
		}
		for _, bySettings := range []bool{true, false} {
			setting := "state_dir"
			if r.settings["state_dir"] = dir; !bySettings {
				setting = ""
				delete(r.settings, "state_dir")
				t.Setenv(plugins.StateVariable, r.state())
			}
			faults := r.must(q).Faults
			if !damaged && len(faults) == 0 {
				continue
			}
			if !damaged || len(faults) != 1 || faults[0].Setting != setting || faults[0].Warning || !strings.Contains(faults[0].Message, r.state()+"/wraps.json") ||
				!strings.Contains(faults[0].Message, "rotate the keys") || strings.Contains(faults[0].Message, "\n") {
				t.Errorf("%q, by the settings %v: %+v, damaged %v", content, bySettings, faults, damaged)
			}
		}
		if got, err := os.ReadFile(filepath.Join(r.state(), "wraps.json")); content != "" && (err != nil || string(got) != content) {
			t.Errorf("%q was changed to %q: %v", content, got, err)
		}
		_ = os.Remove(filepath.Join(r.state(), "wraps.json"))
	}
	entries, err := os.ReadDir(r.state())
	if err != nil || len(entries) != 0 {
		t.Errorf("check has left %v: %v", entries, err)
	}
}

// The agent hands the PIN over as an open file: the confined plugin, which cannot open
// it, logs in, and does so again when it was changed.
func TestPINByDescriptor(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	path := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(path, []byte("not the PIN"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	delete(r.settings, "pin_file")
	r.settings["pin_descriptor"] = path
	cfg := plugintest.Config(t, "pkcs11", r.json())
	cfg.Env, cfg.Descriptors = append(cfg.Env, r.Env()...), []*os.File{f} // its name is the path
	cfg.Access.Read, cfg.Access.Write = []string{r.Path("softhsm2.conf")}, []string{r.Tokens(), r.state()}
	s := unready(t, cfg)
	wrap := func() error {
		_, err := s.Wrap(bounded(t), orders, make([]byte, 32), plugins.Binding{Purpose: "message"})
		return err
	}
	eventually(t, func() error {
		if err := wrap(); plugins.ClassOf(err) != plugins.Unauthenticated || !strings.Contains(err.Error(), "descriptor "+path) {
			return fmt.Errorf("with a wrong PIN: %w", errors.Join(err, errors.New("want Unauthenticated")))
		}
		return nil
	})
	if err := os.WriteFile(path, []byte(hsmtest.PIN), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, wrap)
	if err := s.Replace(bounded(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, wrap)
}

// What was found out of a URI holds for the token that it was compared with.
func TestAnotherTokenTakesThePlace(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	serial := r.must(request{Command: "probe"}).Probe.Serial
	uri := "pkcs11:token=kms;serial=" + serial + ";object=orders"
	cfg := plugintest.Config(t, "pkcs11", r.json())
	cfg.Env = append(cfg.Env, r.Env()...)
	cfg.Access.Read, cfg.Access.Write = []string{r.Dir()}, []string{r.Tokens(), r.state()}
	s := plugintest.Start(t, cfg)
	eventually(t, func() error { _, err := s.Describe(bounded(t), uri); return err })
	entries, err := filepath.Glob(r.Tokens() + "/*")
	if err != nil {
		t.Fatal(err)
	}
	r.Run("softhsm2-util", "--init-token", "--free", "--label", "kms", "--so-pin", "87654321", "--pin", hsmtest.PIN)
	for _, e := range entries {
		if err := os.RemoveAll(e); err != nil {
			t.Fatal(err)
		}
	}
	r.must(request{Command: "init-key", Key: "orders"})
	eventually(t, func() error {
		if _, err := s.Describe(bounded(t), uri); plugins.ClassOf(err) != plugins.KeyNotFound {
			return fmt.Errorf("the URI has the serial number of the token that is gone: %w", errors.Join(err, errors.New("want KeyNotFound")))
		}
		return nil
	})
	if _, err := s.Describe(bounded(t), orders.URI); err != nil {
		t.Errorf("the key of the new token: %v", err)
	}
}

// The agent's log has both cures of what the confinement forbids, whatever the library
// makes of that.
func TestCureOfConfinement(t *testing.T) {
	for _, cause := range []string{
		"open /var/lib/kms-agent/plugins/hsm/logins.json: permission denied",
		"the token is not attached: initialise the module: can it read and write what its own configuration names?: C_Initialize: CKR_GENERAL_ERROR (0x5)",
		"the module shows no token",
	} {
		err := classified(&hsm.Error{Kind: hsm.Unavailable, Err: errors.New(cause)})
		for _, part := range []string{"access of its backend", "under write", "kms-agent plugin restart"} {
			if n := strings.Count(err.Error(), part); n != 1 {
				t.Errorf("%v has %q %d times", err, part, n)
			}
		}
		if got := strings.Contains(err.Error(), "mode and owner"); got != strings.Contains(cause, "denied") {
			t.Errorf("%v: modes of files are told: %v", err, got)
		}
		if n := len(err.Error()); n > 512 {
			t.Errorf("%d bytes, of which the agent shows 512: %v", n, err)
		}
	}
	if err := classified(&hsm.Error{Kind: hsm.Unavailable, Err: errors.New("C_OpenSession: CKR_DEVICE_ERROR")}); strings.Contains(err.Error(), "access") {
		t.Errorf("what has another cause has these cures: %v", err)
	}
}

// A directory of tokens that was replaced by a copy of it is out of a running process's
// reach: its error names what the next process shows to be the cure.
func TestReplacedTokens(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	cfg := plugintest.Config(t, "pkcs11", r.json())
	cfg.Env = append(cfg.Env, r.Env()...)
	cfg.Access.Read, cfg.Access.Write = []string{r.Path("softhsm2.conf"), r.PINFile()}, []string{r.Tokens(), r.state()}
	s := plugintest.Start(t, cfg)
	wrap := func() error {
		_, err := s.Wrap(bounded(t), orders, make([]byte, 32), plugins.Binding{Purpose: "message"})
		return err
	}
	eventually(t, wrap)
	if err := os.CopyFS(r.Path("copy"), os.DirFS(r.Tokens())); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Rename(r.Tokens(), r.Path("away")), os.Rename(r.Path("copy"), r.Tokens()), os.RemoveAll(r.Path("away"))); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if err := wrap(); err == nil || !strings.Contains(err.Error(), "kms-agent plugin restart") {
			return fmt.Errorf("without its tokens: %w", errors.Join(err, errors.New("want the cure")))
		}
		return nil
	})
	if err := s.Replace(bounded(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, wrap)
}

// An operator who waits is told why once, not with each attempt.
func TestWaitingIsToldOnce(t *testing.T) {
	r := newRig(t)
	if err := os.Rename(r.Tokens(), r.Path("away")); err != nil {
		t.Fatal(err)
	}
	a, diagnostics := r.ask(request{Command: "list"})
	if n := bytes.Count(diagnostics, []byte("waiting for the token")); n != 1 || a.Class != "unavailable" {
		t.Errorf("told %d times, %+v:\n%s", n, a, diagnostics)
	}
}
