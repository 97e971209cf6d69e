package identity_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/identity"
)

// helperListen listens and says so, until it is killed.
func helperListen() {
	if _, err := identity.Listen(context.Background(), os.Getenv(helperPath), 0o600, -1); err != nil {
		panic(err)
	}
	_, _ = os.Stdout.WriteString("x")
	_, _ = os.Stdin.Read(make([]byte, 1))
}

func listen(t testing.TB, path string, mode fs.FileMode) net.Listener {
	t.Helper()
	l, err := identity.Listen(t.Context(), path, mode, -1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func wantNoListen(t testing.TB, path string, mode fs.FileMode, text string) {
	t.Helper()
	l, err := identity.Listen(t.Context(), path, mode, -1)
	if err == nil {
		_ = l.Close()
		t.Fatalf("listens on %q", path)
	}
	if !strings.Contains(err.Error(), text) {
		t.Fatalf("got %q, want it to say %q", err, text)
	}
}

func wantFiles(t testing.TB, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("the directory holds %v, want %v", got, want)
	}
}

func TestListenMode(t *testing.T) {
	for _, mask := range []int{0, 0o022, 0o077, 0o177} {
		for _, mode := range []fs.FileMode{0o600, 0o660, 0o666} {
			t.Run(fmt.Sprintf("umask %#o mode %#o", mask, mode), func(t *testing.T) {
				dir := tempDir(t)
				path := filepath.Join(dir, "s")
				old := syscall.Umask(mask)
				l := listen(t, path, mode)
				syscall.Umask(old)
				info, err := os.Lstat(path)
				if err != nil {
					t.Fatal(err)
				}
				if got := info.Mode(); got != mode|fs.ModeSocket {
					t.Errorf("mode %v, want %v", got, mode|fs.ModeSocket)
				}
				if got := l.Addr().String(); got != path {
					t.Errorf("address %q, want %q", got, path)
				}
				conn, err := net.Dial("unix", path)
				if err != nil {
					t.Fatal(err)
				}
				_ = conn.Close()
				wantFiles(t, dir, "s", "s.lock")
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				wantFiles(t, dir)
				if err := l.Close(); err != nil {
					t.Errorf("second Close: %v", err)
				}
			})
		}
	}
}

func TestListenGroup(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	l, err := identity.Listen(t.Context(), path, 0o660, os.Getgid())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Sys().(*syscall.Stat_t).Gid; int(got) != os.Getgid() {
		t.Errorf("group %d, want %d", got, os.Getgid())
	}
}

func TestListenPath(t *testing.T) {
	dir := tempDir(t)
	long := filepath.Join(dir, strings.Repeat("x", identity.MaxSocketPath-len(dir)-1))
	listen(t, long, 0o600)
	conn, err := net.Dial("unix", long)
	if err != nil {
		t.Fatalf("the longest path cannot be reached: %v", err)
	}
	_ = conn.Close()
	wantNoListen(t, long+"x", 0o600, "108 bytes long and the kernel allows 107")
	wantNoListen(t, "relative.sock", 0o600, "absolute")
	wantNoListen(t, "@abstract", 0o600, "absolute")
	wantNoListen(t, "\x00abstract", 0o600, "absolute")
	wantNoListen(t, "/a\x00b", 0o600, "absolute")
	wantNoListen(t, "", 0o600, "absolute")
	wantNoListen(t, filepath.Join(dir, "missing", "s"), 0o600, "no such file")
	wantNoListen(t, filepath.Join(dir, "s"), 0, "no mode for a socket")
	wantNoListen(t, filepath.Join(dir, "s"), 0o600|fs.ModeSetuid, "no mode for a socket")
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	wantNoListen(t, filepath.Join(dir, "s"), 0o600, "everybody may replace files")
	if err := os.Chmod(dir, 0o777|fs.ModeSticky); err != nil {
		t.Fatal(err)
	}
	listen(t, filepath.Join(dir, "s"), 0o600)
}

func TestListenLeavesALiveSocketAlone(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	listen(t, path, 0o600)
	wantNoListen(t, path, 0o600, "another process listens there")

	// One that does not know of the lock.
	path = filepath.Join(tempDir(t), "s")
	other, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	wantNoListen(t, path, 0o600, "another process is listening there")
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the other process's socket is gone: %v", err)
	}
	_ = conn.Close()
	wantFiles(t, filepath.Dir(path), "s")
}

// A server that is too busy to take a connection is alive.
func TestListenLeavesABusySocketAlone(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		conn, err := net.Dial("unix", path)
		if errors.Is(err, unix.EAGAIN) {
			wantNoListen(t, path, 0o600, "another process may be listening there")
			wantFiles(t, filepath.Dir(path), "s")
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
	}
	t.Fatal("the server's queue never filled")
}

func TestListenLeavesOtherFilesAlone(t *testing.T) {
	dir := tempDir(t)
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	wantNoListen(t, file, 0o600, "no socket")
	wantNoListen(t, link, 0o600, "no socket")
	if err := os.Symlink(file, filepath.Join(dir, "s.lock")); err != nil {
		t.Fatal(err)
	}
	wantNoListen(t, filepath.Join(dir, "s"), 0o600, "too many levels of symbolic links")
	if got, err := os.ReadFile(file); err != nil || string(got) != "precious" {
		t.Fatalf("the file holds %q (%v)", got, err)
	}
}

func TestListenReplacesAStaleSocket(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	cmd := helper(t, "listen", path)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stdin.Close() }()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	wantNoListen(t, path, 0o600, "another process listens there")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	wantFiles(t, filepath.Dir(path), "s", "s.lock")
	listen(t, path, 0o600)
}

func TestListenCloseLeavesAnothersSocket(t *testing.T) {
	dir := tempDir(t)
	path := filepath.Join(dir, "s")
	l := listen(t, path, 0o600)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dir, "s")
}

// However many want the same path, one at a time has it, and who has it can be
// reached by it.
func TestListenRace(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	var holders, wins atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				l, err := identity.Listen(t.Context(), path, 0o600, -1)
				if err != nil {
					continue
				}
				wins.Add(1)
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d listen at once", n)
				}
				if conn, err := net.Dial("unix", path); err != nil {
					t.Errorf("the listener cannot be reached: %v", err)
				} else {
					_ = conn.Close()
				}
				holders.Add(-1)
				if err := l.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			}
		})
	}
	wg.Wait()
	if wins.Load() == 0 {
		t.Error("nobody ever listened")
	}
	wantFiles(t, filepath.Dir(path))
}
