package local_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/plugins/local"
)

// Each case makes one fault; its error must be found by errors.Is, say where
// the fault is and name the cure.
func TestEveryErrorNamesItsCure(t *testing.T) {
	type fault func(t *testing.T, dir string) error
	rewrite := func(change func([]byte) []byte) fault {
		return func(t *testing.T, _ string) error {
			seal := keyFile(t)
			k := newStore(t, seal, "orders")
			write(t, k.Path(), change(read(t, k.Path())))
			_, err := local.Open(k.Path(), seal)
			return err
		}
	}
	withSeal := func(seal local.Seal, content string) fault {
		return func(t *testing.T, dir string) error {
			for _, path := range []*string{&seal.KeyFile, &seal.PassphraseFile} {
				if *path == "in-dir" {
					*path = filepath.Join(dir, "seal")
					write(t, *path, []byte(content))
				}
			}
			_, err := local.Create(filepath.Join(dir, "keystore"), seal)
			return err
		}
	}
	onStore := func(act func(k *local.Keystore) error) fault {
		return func(t *testing.T, _ string) error { return act(newStore(t, keyFile(t), "orders")) }
	}
	for _, c := range []struct {
		name  string
		fault fault
		want  error
		text  []string
	}{
		{"no keystore", func(t *testing.T, dir string) error {
			_, err := local.Open(filepath.Join(dir, "keystore"), keyFile(t))
			return err
		}, local.ErrNotExist, []string{"keystore", "create it, or check the path"}},
		{"no directory", func(t *testing.T, dir string) error {
			_, err := local.Create(filepath.Join(dir, "none", "keystore"), keyFile(t))
			return err
		}, local.ErrNotExist, []string{"directory", "none"}},
		{"no path", func(t *testing.T, _ string) error {
			_, err := local.Open("", keyFile(t))
			return err
		}, local.ErrName, []string{"give the path"}},
		{"path below a file", func(t *testing.T, _ string) error {
			seal := keyFile(t)
			_, err := local.Open(filepath.Join(seal.KeyFile, "keystore"), seal)
			return err
		}, local.ErrAccess, []string{"not a directory"}},
		{"a directory", func(t *testing.T, dir string) error {
			_, err := local.Open(dir, keyFile(t))
			return err
		}, local.ErrForeign, []string{"not a regular file", "check the path"}},
		{"foreign", rewrite(func(b []byte) []byte { return []byte("-----BEGIN PRIVATE KEY-----") }), local.ErrForeign, []string{"check the path"}},
		{"too large", rewrite(func(b []byte) []byte { return make([]byte, local.MaxFileSize+1) }), local.ErrForeign, []string{"check the path"}},
		{"empty", rewrite(func(b []byte) []byte { return nil }), local.ErrTruncated, []string{"empty", "backup"}},
		{"half a header", rewrite(func(b []byte) []byte { return b[:50] }), local.ErrTruncated, []string{"backup"}},
		{"half a body", rewrite(func(b []byte) []byte { return b[:130] }), local.ErrTruncated, []string{"130 of", "backup"}},
		{"newer", rewrite(func(b []byte) []byte { b[8] = 2; return b }), local.ErrNewer, []string{"version 2", "newer one"}},
		{"version 0", rewrite(func(b []byte) []byte { b[8] = 0; return b }), local.ErrDamaged, []string{"backup"}},
		{"kind 3", rewrite(func(b []byte) []byte { b[9] = 3; return b }), local.ErrDamaged, []string{"backup"}},
		{"a backup", rewrite(func(b []byte) []byte { b[9] = 2; return b }), local.ErrForeign, []string{"it is a backup", "restore it"}},
		{"seal kind 9", rewrite(func(b []byte) []byte { b[10] = 9; return b }), local.ErrDamaged, []string{"backup"}},
		{"sealed by passphrase", rewrite(func(b []byte) []byte { b[10], b[13], b[14] = 2, 4, 4; return b }),
			local.ErrWrongSeal, []string{"a passphrase", "key file /", "name the seal it was made with"}},
		{"endless stretching", rewrite(func(b []byte) []byte { b[10], b[12] = 2, 0xff; return b }), local.ErrDamaged, []string{"PBKDF2 rounds", "backup"}},
		{"flipped body", rewrite(func(b []byte) []byte { b[len(b)-1] ^= 1; return b }), local.ErrDamaged, []string{"authentication", "backup"}},
		{"other key file", func(t *testing.T, _ string) error {
			_, err := local.Open(newStore(t, keyFile(t)).Path(), keyFile(t))
			return err
		}, local.ErrWrongSeal, []string{"seal.key", "name the seal it was made with"}},
		{"other passphrase", func(t *testing.T, _ string) error {
			_, err := local.Open(newStore(t, passphrase(t, "correct horse battery staple")).Path(), passphrase(t, "wrong horse battery staple"))
			return err
		}, local.ErrWrongSeal, []string{"passphrase file", "name the seal it was made with"}},
		{"readable keystore", func(t *testing.T, _ string) error {
			seal := keyFile(t)
			k := newStore(t, seal)
			must(t, os.Chmod(k.Path(), 0o644))
			_, err := local.Open(k.Path(), seal)
			return err
		}, local.ErrInsecure, []string{"0644", "chmod 600"}},
		{"readable key file", func(t *testing.T, dir string) error {
			seal := keyFile(t)
			must(t, os.Chmod(seal.KeyFile, 0o644))
			_, err := local.Create(filepath.Join(dir, "keystore"), seal)
			return err
		}, local.ErrInsecure, []string{"key file", "0644", "chmod 600", "replace the secret"}},
		{"no seal", withSeal(local.Seal{}, ""), local.ErrSeal, []string{"set one of"}},
		{"two seals", withSeal(local.Seal{KeyFile: "/a", Credential: "b"}, ""), local.ErrSeal, []string{"set only one"}},
		{"relative key file", withSeal(local.Seal{KeyFile: "seal.key"}, ""), local.ErrSeal, []string{"absolute"}},
		{"no key file", withSeal(local.Seal{KeyFile: "/nonexistent/seal.key"}, ""), local.ErrNotExist, []string{"/nonexistent/seal.key", "create it"}},
		{"short key file", withSeal(local.Seal{KeyFile: "in-dir"}, "short"), local.ErrSeal, []string{"5 bytes", "exactly 32 random bytes"}},
		{"long key file", withSeal(local.Seal{KeyFile: "in-dir"}, strings.Repeat("ab", 32)), local.ErrSeal, []string{"64 bytes", "at most 32"}},
		{"constant key file", withSeal(local.Seal{KeyFile: "in-dir"}, strings.Repeat("\x00", 32)), local.ErrSeal, []string{"random"}},
		{"empty key file", withSeal(local.Seal{KeyFile: "in-dir"}, ""), local.ErrSeal, []string{"0 bytes", "exactly 32 random bytes"}},
		{"short passphrase", withSeal(local.Seal{PassphraseFile: "in-dir"}, "too short\n"), local.ErrSeal, []string{"at least 16"}},
		{"long passphrase", withSeal(local.Seal{PassphraseFile: "in-dir"}, strings.Repeat("a", 1025)), local.ErrSeal, []string{"1024", "shorten"}},
		{"two-line passphrase", withSeal(local.Seal{PassphraseFile: "in-dir"}, "correct horse\nbattery staple\n"), local.ErrSeal, []string{"one line"}},
		{"binary passphrase", withSeal(local.Seal{PassphraseFile: "in-dir"}, strings.Repeat("\xff", 32)), local.ErrSeal, []string{"UTF-8", "key file"}},
		{"credential path", withSeal(local.Seal{Credential: "../seal"}, ""), local.ErrSeal, []string{"LoadCredential="}},
		{"create over", func(t *testing.T, _ string) error {
			seal := keyFile(t)
			_, err := local.Create(newStore(t, seal).Path(), seal)
			return err
		}, local.ErrExists, []string{"choose another path"}},
		{"unknown key", onStore(func(k *local.Keystore) error { return k.Disable("other", "1") }), local.ErrUnknownKey, []string{`"other"`, "list", "create"}},
		{"unknown version", onStore(func(k *local.Keystore) error { return k.Disable("orders", "7") }), local.ErrUnknownVersion, []string{"orders", "1 to 1"}},
		{"bad name", onStore(func(k *local.Keystore) error { return k.CreateKey("a b") }), local.ErrName, []string{`"a b"`, "a-z"}},
		{"key exists", onStore(func(k *local.Keystore) error { return k.CreateKey("orders") }), local.ErrExists, []string{"orders", "rotate"}},
		{"destroy enabled", onStore(func(k *local.Keystore) error { return k.Destroy("orders", "1") }), local.ErrKeyState, []string{"disable it first"}},
		{"enable destroyed", onStore(func(k *local.Keystore) error {
			return errors.Join(k.Disable("orders", "1"), k.Destroy("orders", "1"), k.Enable("orders", "1"))
		}), local.ErrKeyState, []string{"destroyed", "restore a backup"}},
		{"conflicting backup", func(t *testing.T, _ string) error {
			seal := keyFile(t)
			_, err := newStore(t, seal, "orders").Merge(backupOf(t, newStore(t, seal, "orders"), seal), seal)
			return err
		}, local.ErrConflict, []string{"orders version 1", "new path"}},
		{"foreign backup", func(t *testing.T, _ string) error {
			seal := keyFile(t)
			_, err := newStore(t, seal).Merge(bytes.NewReader([]byte("no backup at all")), seal)
			return err
		}, local.ErrForeign, []string{"backup", "check the path"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.fault(t, t.TempDir())
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			t.Log(err)
			for _, text := range c.text {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("error does not say %q: %v", text, err)
				}
			}
		})
	}
}

func TestCredential(t *testing.T) {
	dir := t.TempDir()
	content := read(t, keyFile(t).KeyFile)
	write(t, filepath.Join(dir, "kms-agent-seal"), content)
	seal := local.Seal{Credential: "kms-agent-seal"}
	path := filepath.Join(t.TempDir(), "keystore")
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if _, err := local.Create(path, seal); !errors.Is(err, local.ErrSeal) || !strings.Contains(err.Error(), "LoadCredential=") {
		t.Errorf("without a credentials directory: got %v", err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	// systemd's mode where an ACL grants the service access
	must(t, os.Chmod(filepath.Join(dir, "kms-agent-seal"), 0o440))
	k, err := local.Create(path, seal)
	must(t, err)
	k.Close()
	// the same bytes in a key file are the same seal
	same := filepath.Join(t.TempDir(), "seal.key")
	write(t, same, content)
	k, err = local.Open(path, local.Seal{KeyFile: same})
	must(t, err)
	k.Close()
	must(t, os.Chmod(filepath.Join(dir, "kms-agent-seal"), 0o444))
	if _, err := local.Open(path, seal); !errors.Is(err, local.ErrInsecure) {
		t.Errorf("credential readable by others: got %v, want ErrInsecure", err)
	}
}

func TestPassphraseLineEnds(t *testing.T) {
	k := newStore(t, passphrase(t, "correct horse battery staple"))
	for _, end := range []string{"\n", "\r\n"} {
		again, err := local.Open(k.Path(), passphrase(t, "correct horse battery staple"+end))
		if err != nil {
			t.Errorf("with line end %q: %v", end, err)
			continue
		}
		again.Close()
	}
}
