package local_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/local"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// childVariable makes the test binary a child process of one kind (children).
const childVariable = "KMS_AGENT_LOCAL_TEST_CHILD"

// children are run with the keystore's path and the key file's path.
var children = map[string]func(path string, seal local.Seal) error{
	"rotate-forever": rotateForever,
	"create-keys":    createKeys,
	"no-space":       noSpace,
	"no-memory":      noMemory,
	"fips":           fipsRoundTrip,
}

func TestMain(m *testing.M) {
	plugintest.ServeIfChild(map[string]func() plugins.Backend{"local": func() plugins.Backend { return local.New() }})
	child, ok := children[os.Getenv(childVariable)]
	if !ok {
		goleak.VerifyTestMain(m)
		return
	}
	if err := child(os.Args[1], local.Seal{KeyFile: os.Args[2]}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// childCommand runs this test binary as a child.
func childCommand(t *testing.T, kind, path string, seal local.Seal) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", path, seal.KeyFile)
	cmd.Env = []string{childVariable + "=" + kind, "GODEBUG=" + os.Getenv("GODEBUG")}
	return cmd
}

func runChild(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("child: %v: %s", err, out)
	}
}

// rotateForever prints each version after it was made.
func rotateForever(path string, seal local.Seal) error {
	k, err := local.Open(path, seal)
	if err != nil {
		return err
	}
	for range local.MaxVersions {
		version, err := k.Rotate("orders")
		if err != nil {
			return err
		}
		fmt.Println(version)
	}
	return nil
}

const keysPerChild = 8

func createKeys(path string, seal local.Seal) error {
	k, err := local.Open(path, seal)
	if err != nil {
		return err
	}
	for i := range keysPerChild {
		if err := k.CreateKey(fmt.Sprintf("p%d/k%d", os.Getpid(), i)); err != nil {
			return err
		}
	}
	return nil
}

// noSpace forbids files of more than a few bytes, so that the write fails half
// way as on a full disk.
func noSpace(path string, seal local.Seal) error {
	signal.Ignore(unix.SIGXFSZ)
	k, err := local.Open(path, seal)
	if err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 64, Max: 64}); err != nil {
		return err
	}
	if err := k.CreateKey("new"); !errors.Is(err, local.ErrWrite) {
		return fmt.Errorf("CreateKey without space: got %w, want ErrWrite", err)
	}
	return nil
}

func noMemory(path string, seal local.Seal) error {
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{}); err != nil {
		return err
	}
	if _, err := local.Open(path, seal); !errors.Is(err, local.ErrMemory) {
		return fmt.Errorf("open without lockable memory: got %w, want ErrMemory", err)
	}
	return nil
}

// keyFile makes a new key file and returns the seal that names it.
func keyFile(t testing.TB) local.Seal {
	t.Helper()
	path := filepath.Join(t.TempDir(), "seal.key")
	if err := local.CreateKeyFile(path); err != nil {
		t.Fatalf("CreateKeyFile: %v", err)
	}
	return local.Seal{KeyFile: path}
}

func passphrase(t testing.TB, text string) local.Seal {
	t.Helper()
	path := filepath.Join(t.TempDir(), "passphrase")
	write(t, path, []byte(text))
	return local.Seal{PassphraseFile: path}
}

func write(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// newStore makes a keystore with the keys named.
func newStore(t testing.TB, seal local.Seal, keys ...string) *local.Keystore {
	t.Helper()
	k, err := local.Create(filepath.Join(t.TempDir(), "keystore"), seal)
	if err != nil {
		t.Fatalf("Create: %v", err)
	}
	t.Cleanup(k.Close)
	for _, name := range keys {
		if err := k.CreateKey(name); err != nil {
			t.Fatalf("CreateKey(%q): %v", name, err)
		}
	}
	return k
}

// must fails the test where one of errs is one.
func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func states(t testing.TB, k *local.Keystore, name string) string {
	t.Helper()
	info, err := k.Key(name)
	must(t, err)
	var b bytes.Buffer
	for _, v := range info.Versions {
		fmt.Fprintf(&b, "%s:%s ", v.Version, v.State)
	}
	return b.String()
}
