package local_test

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/plugins/local"
)

// everyState is a keystore with versions in each state.
func everyState(t testing.TB, seal local.Seal) *local.Keystore {
	t.Helper()
	k := newStore(t, seal, "archive", "orders")
	for range 3 {
		_, err := k.Rotate("orders")
		must(t, err)
	}
	must(t, k.Disable("orders", "1"), k.Destroy("orders", "1"), k.Disable("orders", "2"))
	return k
}

func backupOf(t testing.TB, k *local.Keystore, seal local.Seal) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	must(t, k.Backup(&b, seal))
	return &b
}

func TestBackupRoundTrip(t *testing.T) {
	for name, backupSeal := range map[string]local.Seal{
		"key file": keyFile(t), "passphrase": passphrase(t, "correct horse battery staple"),
	} {
		t.Run(name, func(t *testing.T) {
			k := everyState(t, keyFile(t))
			before, err := k.List()
			must(t, err)
			infoBefore, err := k.Info()
			must(t, err)
			to := keyFile(t)
			restored, err := local.Restore(backupOf(t, k, backupSeal), backupSeal, filepath.Join(t.TempDir(), "restored"), to)
			must(t, err)
			defer restored.Close()
			after, err := restored.List()
			must(t, err)
			if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("restored (-want +got):\n%s", diff)
			}
			infoAfter, err := restored.Info()
			must(t, err)
			if infoAfter.ID != infoBefore.ID || infoAfter.Generation != infoBefore.Generation+1 {
				t.Errorf("restored as %+v from %+v", infoAfter, infoBefore)
			}
		})
	}
}

func TestRestoreRefuses(t *testing.T) {
	seal, other := keyFile(t), keyFile(t)
	k := everyState(t, seal)
	backup := backupOf(t, k, seal).Bytes()
	flipped := bytes.Clone(backup)
	flipped[len(flipped)-20] ^= 1
	before := read(t, k.Path())
	fresh := filepath.Join(t.TempDir(), "restored")
	for _, c := range []struct {
		what   string
		backup []byte
		seal   local.Seal
		path   string
		want   error
	}{
		{"over a keystore", backup, seal, k.Path(), local.ErrExists},
		{"wrong seal", backup, other, fresh, local.ErrWrongSeal},
		{"damaged", flipped, seal, fresh, local.ErrDamaged},
		{"truncated", backup[:len(backup)-1], seal, fresh, local.ErrTruncated},
		{"a keystore", before, seal, fresh, local.ErrForeign},
		{"nothing", nil, seal, fresh, local.ErrTruncated},
		{"too large", make([]byte, local.MaxFileSize+1), seal, fresh, local.ErrForeign},
		{"no seal", backup, local.Seal{}, fresh, local.ErrSeal},
	} {
		_, err := local.Restore(bytes.NewReader(c.backup), c.seal, c.path, seal)
		if !errors.Is(err, c.want) {
			t.Errorf("restore %s: got %v, want %v", c.what, err, c.want)
		}
	}
	if !bytes.Equal(read(t, k.Path()), before) {
		t.Error("a refused restore changed the keystore")
	}
	if _, err := local.Open(fresh, seal); !errors.Is(err, local.ErrNotExist) {
		t.Errorf("a refused restore left a keystore: %v", err)
	}
}

func TestBackupIsNoKeystore(t *testing.T) {
	seal := keyFile(t)
	path := filepath.Join(t.TempDir(), "backup")
	k := newStore(t, seal)
	must(t, k.BackupFile(path, seal))
	if _, err := local.Open(path, seal); !errors.Is(err, local.ErrForeign) {
		t.Errorf("open a backup: got %v, want ErrForeign", err)
	}
	if err := k.BackupFile(path, seal); !errors.Is(err, local.ErrExists) {
		t.Errorf("backup over a backup: got %v, want ErrExists", err)
	}
}

func TestMerge(t *testing.T) {
	seal := keyFile(t)
	k := everyState(t, seal)
	old := backupOf(t, k, seal)
	must(t, k.Enable("orders", "2"), k.Disable("orders", "3"), k.Destroy("orders", "3"), k.CreateKey("later"))
	_, err := k.Rotate("archive")
	must(t, err)
	newer := backupOf(t, k, seal)

	before := read(t, k.Path())
	report, err := k.Merge(old, seal)
	must(t, err)
	want := local.MergeReport{Kept: []local.VersionRef{{Name: "orders", Version: "2"}, {Name: "orders", Version: "3"}}}
	if diff := cmp.Diff(want, report); diff != "" {
		t.Errorf("merge of an older backup (-want +got):\n%s", diff)
	}
	if !bytes.Equal(before, read(t, k.Path())) {
		t.Error("a merge that adds nothing wrote the keystore")
	}

	behind := newStore(t, seal, "own")
	report, err = behind.Merge(newer, seal)
	must(t, err)
	if got, want := fmt.Sprint(report.Added), "[archive version 1 archive version 2 later version 1 orders version 1 orders version 2 orders version 3 orders version 4]"; got != want {
		t.Errorf("merge into another keystore: added %s, want %s", got, want)
	}
	if got, want := states(t, behind, "orders"), "1:destroyed 2:enabled 3:destroyed 4:enabled "; got != want {
		t.Errorf("merged states: got %q, want %q", got, want)
	}
}

func TestMergeConflict(t *testing.T) {
	seal := keyFile(t)
	one, two := newStore(t, seal, "a", "orders"), newStore(t, seal, "orders")
	before := read(t, two.Path())
	if _, err := two.Merge(backupOf(t, one, seal), seal); !errors.Is(err, local.ErrConflict) {
		t.Errorf("got %v, want ErrConflict", err)
	}
	if !bytes.Equal(before, read(t, two.Path())) {
		t.Error("a refused merge changed the keystore")
	}
}
