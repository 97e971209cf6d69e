package seal_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/kms-agent/kms-agent/cache/seal"
)

const childVariable = "KMS_AGENT_SEAL_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) == "" {
		os.Exit(m.Run())
	}
	if err := saveForever(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// saveForever saves rising numbers in dir and says each when it is in force.
func saveForever(dir string) error {
	sealer, err := seal.OpenFile(filepath.Join(dir, "sealer"))
	if err != nil {
		return err
	}
	store, err := seal.OpenStore(filepath.Join(dir, "store"), sealer)
	if err != nil {
		return err
	}
	n := uint64(0)
	l, err := store.Load()
	switch {
	case err == nil:
		n = binary.BigEndian.Uint64(l.Records[0].Value)
	case !errors.Is(err, seal.ErrNotExist):
		return err
	}
	for {
		n++
		if err := store.Save([]seal.Record{{Type: seal.Note, Value: binary.BigEndian.AppendUint64(nil, n)}}); err != nil {
			return err
		}
		fmt.Println(n)
	}
}

func childCommand(t *testing.T, dir string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", dir)
	cmd.Env = []string{childVariable + "=1"}
	return cmd
}

// host is a sealer as the kernel and a TPM are: its counter is out of reach.
type host struct {
	*seal.Key
	counter uint64
	broken  error // what Advance returns, if anything, instead of counting
	others  uint64
}

func newHost(t *testing.T, secret byte) *host {
	t.Helper()
	b := make([]byte, seal.SecretSize)
	b[0] = secret
	key, err := seal.NewKey(b)
	must(t, err)
	t.Cleanup(key.Free)
	return &host{Key: key}
}

func (h *host) Counter() (uint64, error) { return h.counter, nil }

func (h *host) Advance() (uint64, error) {
	if h.broken != nil {
		return 0, h.broken
	}
	h.counter += 1 + h.others
	return h.counter, nil
}

func (h *host) String() string { return "host" }

func open(t *testing.T, path string, s seal.Sealer) *seal.Store {
	t.Helper()
	store, err := seal.OpenStore(path, s)
	must(t, err)
	t.Cleanup(store.Close)
	return store
}

func records(values ...string) []seal.Record {
	var list []seal.Record
	for i, v := range values {
		list = append(list, seal.Record{Type: seal.RecordType(i%5 + 1), Value: []byte(v)})
	}
	return list
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	must(t, os.WriteFile(path, b, 0o600))
}
