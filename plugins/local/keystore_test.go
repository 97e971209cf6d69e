package local_test

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/plugins/local"
)

func TestKeyLifeCycle(t *testing.T) {
	k := newStore(t, keyFile(t), "orders", "archive/2024")
	version, err := k.Rotate("orders")
	must(t, err, k.Disable("orders", "1"))
	if version != "2" {
		t.Errorf("Rotate: got version %q, want 2", version)
	}
	if got, want := states(t, k, "orders"), "1:disabled 2:enabled "; got != want {
		t.Errorf("states: got %q, want %q", got, want)
	}
	must(t, k.Enable("orders", "1"), k.Disable("orders", "1"), k.Destroy("orders", "1"))
	if got, want := states(t, k, "orders"), "1:destroyed 2:enabled "; got != want {
		t.Errorf("states: got %q, want %q", got, want)
	}
	list, err := k.List()
	must(t, err)
	if len(list) != 2 || list[0].Name != "archive/2024" || list[1].URI != "local:orders" || list[1].Current != "2" {
		t.Errorf("List: got %+v", list)
	}
	if age := time.Since(list[1].Versions[1].Created); age < -time.Second || age > time.Minute {
		t.Errorf("Created is %s ago", age)
	}
}

func TestRefusedChanges(t *testing.T) {
	k := newStore(t, keyFile(t), "orders", "gone")
	must(t, k.Disable("gone", "1"), k.Destroy("gone", "1"))
	before := read(t, k.Path())
	_, rotateErr := k.Rotate("unknown")
	_, keyErr := k.Key("unknown")
	for _, c := range []struct {
		what      string
		err, want error
	}{
		{"create again", k.CreateKey("orders"), local.ErrExists},
		{"create one destroyed", k.CreateKey("gone"), local.ErrExists},
		{"create bad name", k.CreateKey("Orders"), local.ErrName},
		{"rotate unknown", rotateErr, local.ErrUnknownKey},
		{"describe unknown", keyErr, local.ErrUnknownKey},
		{"disable unknown", k.Disable("unknown", "1"), local.ErrUnknownKey},
		{"disable version 2", k.Disable("orders", "2"), local.ErrUnknownVersion},
		{"disable version 0", k.Disable("orders", "0"), local.ErrUnknownVersion},
		{"disable version 01", k.Disable("orders", "01"), local.ErrUnknownVersion},
		{"disable version +1", k.Disable("orders", "+1"), local.ErrUnknownVersion},
		{"disable version empty", k.Disable("orders", ""), local.ErrUnknownVersion},
		{"destroy enabled", k.Destroy("orders", "1"), local.ErrKeyState},
		{"destroy destroyed", k.Destroy("gone", "1"), local.ErrKeyState},
		{"enable destroyed", k.Enable("gone", "1"), local.ErrKeyState},
		{"disable destroyed", k.Disable("gone", "1"), local.ErrKeyState},
	} {
		if !errors.Is(c.err, c.want) {
			t.Errorf("%s: got %v, want %v", c.what, c.err, c.want)
		}
	}
	must(t, k.Enable("orders", "1")) // is enabled
	if !bytes.Equal(read(t, k.Path()), before) {
		t.Error("a refused or empty change wrote the keystore")
	}
}

func TestNames(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "0": true, "orders": true, "shop/orders-2.v_1": true, strings.Repeat("a", 128): true,
		"": false, strings.Repeat("a", 129): false, "A": false, "ä": false, "a b": false, "a//b": false,
		"a/": false, "/a": false, ".a": false, "-a": false, "_a": false, "a\x00": false, "a:b": false, "a\n": false,
	} {
		err := local.CheckName(name)
		if (err == nil) != want || err != nil && !errors.Is(err, local.ErrName) {
			t.Errorf("CheckName(%q): got %v, want ok=%v", name, err, want)
		}
	}
}

func TestCreateNeverReplaces(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	before := read(t, k.Path())
	if _, err := local.Create(k.Path(), seal); !errors.Is(err, local.ErrExists) {
		t.Errorf("Create over a keystore: got %v, want ErrExists", err)
	}
	if err := local.CreateKeyFile(seal.KeyFile); !errors.Is(err, local.ErrExists) {
		t.Errorf("CreateKeyFile over a key file: got %v, want ErrExists", err)
	}
	if !bytes.Equal(read(t, k.Path()), before) {
		t.Error("Create changed the keystore")
	}
}

func TestFilesArePrivate(t *testing.T) {
	dir := t.TempDir()
	seal, path, backup := local.Seal{KeyFile: filepath.Join(dir, "seal.key")}, filepath.Join(dir, "keystore"), filepath.Join(dir, "backup")
	old := unix.Umask(0)
	defer unix.Umask(old)
	must(t, local.CreateKeyFile(seal.KeyFile))
	k, err := local.Create(path, seal)
	must(t, err)
	defer k.Close()
	must(t, k.CreateKey("orders"), k.BackupFile(backup, seal))
	for _, path := range []string{path, path + ".lock", seal.KeyFile, backup} {
		info, err := os.Stat(path)
		must(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %04o, want 0600", filepath.Base(path), info.Mode().Perm())
		}
	}
}

// The model: what a keystore should hold after any sequence of changes, each
// seen by a reader of its own.
func TestAgainstModel(t *testing.T) {
	seal := keyFile(t)
	dir := t.TempDir()
	names := rapid.SampledFrom([]string{"a", "b", "c/d"})
	rapid.Check(t, func(t *rapid.T) {
		path := filepath.Join(dir, strconv.FormatUint(rand.Uint64(), 36))
		k, err := local.Create(path, seal)
		if err != nil {
			t.Fatal(err)
		}
		model := map[string][]local.State{}
		state := func(name string, n int) local.State {
			if n > len(model[name]) {
				return 0
			}
			return model[name][n-1]
		}
		check := func(what string, err error, want bool) {
			if (err == nil) != want {
				t.Fatalf("%s: got %v, want ok=%v in %v", what, err, want, model)
			}
		}
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			name, n := names.Draw(t, "name"), rapid.IntRange(1, 3).Draw(t, "version")
			version := strconv.Itoa(n)
			was := state(name, n)
			switch step := rapid.SampledFrom([]string{"create", "rotate", "disable", "enable", "destroy"}).Draw(t, "step"); step {
			case "create":
				check(step, k.CreateKey(name), model[name] == nil)
				if model[name] == nil {
					model[name] = []local.State{local.Enabled}
				}
			case "rotate":
				_, err := k.Rotate(name)
				check(step, err, model[name] != nil)
				if model[name] != nil {
					model[name] = append(model[name], local.Enabled)
				}
			case "disable":
				check(step, k.Disable(name, version), was == local.Enabled || was == local.Disabled)
				if was == local.Enabled {
					model[name][n-1] = local.Disabled
				}
			case "enable":
				check(step, k.Enable(name, version), was == local.Enabled || was == local.Disabled)
				if was == local.Disabled {
					model[name][n-1] = local.Enabled
				}
			case "destroy":
				check(step, k.Destroy(name, version), was == local.Disabled)
				if was == local.Disabled {
					model[name][n-1] = local.Destroyed
				}
			}
			if diff := cmp.Diff(model, content(t, path, seal)); diff != "" {
				t.Fatalf("content (-want +got):\n%s", diff)
			}
		}
	})
}

func content(t *rapid.T, path string, seal local.Seal) map[string][]local.State {
	k, err := local.Open(path, seal)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	list, err := k.List()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][]local.State{}
	for _, info := range list {
		for _, v := range info.Versions {
			got[info.Name] = append(got[info.Name], v.State)
		}
	}
	return got
}

func TestUnsafePlaces(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal)
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(k.Path(), link))
	if _, err := local.Open(link, seal); !errors.Is(err, local.ErrAccess) {
		t.Errorf("keystore by symbolic link: got %v, want ErrAccess", err)
	}
	must(t, os.Chmod(k.Path(), 0o640))
	if _, err := k.List(); !errors.Is(err, local.ErrInsecure) {
		t.Errorf("keystore readable by group: got %v, want ErrInsecure", err)
	}
	must(t, os.Chmod(k.Path(), 0o600), os.Chmod(filepath.Dir(k.Path()), 0o777))
	if _, err := k.List(); !errors.Is(err, local.ErrInsecure) {
		t.Errorf("keystore in a directory writable by all: got %v, want ErrInsecure", err)
	}
	must(t, os.Chmod(filepath.Dir(k.Path()), 0o777|fs.ModeSticky))
	if _, err := k.List(); err != nil {
		t.Errorf("keystore in a sticky directory: %v", err)
	}
	must(t, os.Chmod(seal.KeyFile, 0o604))
	if _, err := local.Open(k.Path(), seal); !errors.Is(err, local.ErrInsecure) {
		t.Errorf("key file readable by others: got %v, want ErrInsecure", err)
	}
}

func TestReseal(t *testing.T) {
	old, phrase := keyFile(t), passphrase(t, "correct horse battery staple\n")
	k := newStore(t, old, "orders")
	before, err := k.List()
	must(t, err)
	resealed, err := k.Reseal(phrase)
	must(t, err)
	defer resealed.Close()
	if _, err := k.List(); !errors.Is(err, local.ErrWrongSeal) {
		t.Errorf("by the old seal: got %v, want ErrWrongSeal", err)
	}
	must(t, resealed.CreateKey("more"))
	again, err := local.Open(k.Path(), phrase)
	must(t, err)
	defer again.Close()
	after, err := again.List()
	must(t, err)
	if len(after) != 2 || cmp.Diff(before[0], after[1]) != "" {
		t.Errorf("after reseal: got %+v, want %+v and one more", after, before)
	}
}
