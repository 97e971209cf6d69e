package local_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/plugins/local"
)

// A write leaves nothing behind but the file and its lock, removes what a crash
// left, and touches nobody else's files.
func TestLeftovers(t *testing.T) {
	k := newStore(t, keyFile(t))
	dir := filepath.Dir(k.Path())
	long := time.Now().Add(-time.Hour)
	for _, name := range []string{
		".keystore8674665223082153551", ".keystore20240101", ".keystore867466522308215355x", "keystore8674665223082153551", ".other8674665223082153551",
	} {
		write(t, filepath.Join(dir, name), []byte("half"))
		must(t, os.Chtimes(filepath.Join(dir, name), long, long))
	}
	write(t, filepath.Join(dir, ".keystore5577006791947779410"), []byte("of a writer that lives"))
	must(t, k.CreateKey("orders"))
	entries, err := os.ReadDir(dir)
	must(t, err)
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	want := []string{
		".keystore20240101", ".keystore5577006791947779410", ".keystore867466522308215355x", ".other8674665223082153551",
		"keystore", "keystore.lock", "keystore8674665223082153551",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("directory (-want +got):\n%s", diff)
	}
}

func TestConcurrentProcessesLoseNothing(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal)
	const processes = 3
	var running []*exec.Cmd
	for range processes {
		cmd := childCommand(t, "create-keys", k.Path(), seal)
		cmd.Stderr = os.Stderr
		must(t, cmd.Start())
		running = append(running, cmd)
	}
	for _, cmd := range running {
		must(t, cmd.Wait())
	}
	info, err := k.Info()
	must(t, err)
	if want := processes * keysPerChild; info.Keys != want || info.Generation != uint64(want)+1 {
		t.Errorf("got %d keys at generation %d, want %d at %d", info.Keys, info.Generation, want, want+1)
	}
}

// Killed at any moment, a writer leaves the old keystore or the new one, and
// never less than what it reported done.
func TestKillDuringWrites(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	for range 30 {
		cmd := childCommand(t, "rotate-forever", k.Path(), seal)
		out, err := cmd.StdoutPipe()
		must(t, err, cmd.Start())
		lines := bufio.NewScanner(out)
		done := 0
		for range 1 + rand.IntN(3) {
			if lines.Scan() {
				done, _ = strconv.Atoi(lines.Text())
			}
		}
		for deadline := time.Now().Add(time.Duration(rand.IntN(3000)) * time.Microsecond); time.Now().Before(deadline); {
			runtime.Gosched()
		}
		must(t, cmd.Process.Kill())
		for lines.Scan() {
			done, _ = strconv.Atoi(lines.Text())
		}
		_ = cmd.Wait()
		info, err := k.Key("orders")
		if err != nil {
			t.Fatalf("after kill: %v", err)
		}
		if got := len(info.Versions); got != done && got != done+1 {
			t.Fatalf("after kill: %d versions, the child had reported %d", got, done)
		}
	}
	must(t, k.CreateKey("writable"))
}

func TestFullDisk(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	before := read(t, k.Path())
	runChild(t, childCommand(t, "no-space", k.Path(), seal))
	if !bytes.Equal(read(t, k.Path()), before) {
		t.Error("the failed write changed the keystore")
	}
	entries, err := os.ReadDir(filepath.Dir(k.Path()))
	must(t, err)
	if len(entries) != 2 {
		t.Errorf("the failed write left files: %v", entries)
	}
}

func TestNoLockableMemory(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal)
	cmd := childCommand(t, "no-memory", k.Path(), seal)
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its capability set
		// Root ignores the limit by this capability; others have none to drop.
		_ = unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_IPC_LOCK, 0, 0, 0)
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("child: %w: %s", err, out)
		}
		failed <- err
	}()
	must(t, <-failed)
}

func TestLockHeldElsewhere(t *testing.T) {
	k := newStore(t, keyFile(t), "orders")
	lock, err := os.OpenFile(k.Path()+".lock", os.O_RDWR, 0)
	must(t, err)
	defer func() { _ = lock.Close() }()
	must(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if err := k.CreateKey("more"); !errors.Is(err, local.ErrBusy) || !strings.Contains(err.Error(), "fuser "+k.Path()) {
			t.Errorf("change under another's lock: got %v, want ErrBusy", err)
		}
		if waited := time.Since(began); waited < 10*time.Second || waited > 11*time.Second {
			t.Errorf("waited %s, want 10s", waited)
		}
		if _, err := k.List(); err != nil {
			t.Errorf("reading while another process writes: %v", err)
		}
		done := make(chan error)
		go func() { done <- k.CreateKey("more") }()
		time.Sleep(time.Second)
		must(t, unix.Flock(int(lock.Fd()), unix.LOCK_UN), <-done)
	})
}

// Of many that make the same keystore at once, one does.
func TestConcurrentCreate(t *testing.T) {
	seal, path := keyFile(t), filepath.Join(t.TempDir(), "keystore")
	errs := make(chan error)
	for range 8 {
		go func() {
			_, err := local.Create(path, seal)
			errs <- err
		}()
	}
	made := 0
	for range 8 {
		if err := <-errs; err == nil {
			made++
		} else if !errors.Is(err, local.ErrExists) {
			t.Error(err)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	must(t, err)
	if made != 1 || len(entries) != 1 {
		t.Errorf("%d of 8 made it, leaving %v", made, entries)
	}
}
