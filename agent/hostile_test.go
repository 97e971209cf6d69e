package agent_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/local"
)

// faultVariable makes the test binary a plugin that goes wrong as the file that
// it names says.
const faultVariable = "KMS_AGENT_TEST_FAULT"

// serveFaulty is the main of that plugin.
func serveFaulty(path string) {
	b := &faulty{Backend: local.New(), path: path}
	switch b.fault() {
	case "exit at start":
		os.Exit(3)
	case "rubbish at start":
		fmt.Println("rubbish \x1b[2J on standard output")
		time.Sleep(time.Hour) // until the host kills it
	case "hang at start":
		time.Sleep(time.Hour)
	}
	if err := plugins.Serve(b); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// faulty is a backend that goes wrong.
type faulty struct {
	*local.Backend
	path string
}

func (f *faulty) fault() string {
	b, err := os.ReadFile(f.path)
	if err != nil {
		return "unreadable: " + err.Error()
	}
	return string(b)
}

// goWrong does what the file says of this call. The call goes on when it
// returns.
func (f *faulty) goWrong(ctx context.Context, call string) error {
	switch f.fault() {
	case "hang in " + call:
		select {}
	case "wait in " + call:
		<-ctx.Done()
		return ctx.Err()
	case "die in " + call:
		unix.Exit(9)
	case "panic in " + call:
		panic("a value that may be a key")
	case "flood in " + call:
		for range 1000 {
			fmt.Fprintln(os.Stderr, strings.Repeat("flood ", 1000))
		}
	case "error in " + call:
		return errors.New("an error without a class")
	}
	return nil
}

func (f *faulty) Open(ctx context.Context, config json.RawMessage) (plugins.Info, error) {
	if err := f.goWrong(ctx, "open"); err != nil {
		return plugins.Info{}, err
	}
	info, err := f.Backend.Open(ctx, config)
	if f.fault() != "no random" {
		info.Capabilities = append(info.Capabilities, plugins.CapabilityRandom)
	}
	return info, err
}

// Random is the same byte for ever.
func (f *faulty) Random(ctx context.Context, dst []byte) error {
	if err := f.goWrong(ctx, "random"); err != nil {
		return err
	}
	copy(dst, bytes.Repeat([]byte{0xc5}, len(dst)))
	return nil
}

func (f *faulty) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	if err := f.goWrong(ctx, "describe"); err != nil {
		return plugins.Description{}, err
	}
	if f.fault() == "lie in describe" {
		return plugins.Description{Current: "9", Versions: []plugins.KeyVersion{{Version: "1", State: plugins.Enabled}}}, nil
	}
	return f.Backend.Describe(ctx, uri)
}

func (f *faulty) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	if err := f.goWrong(ctx, "wrap"); err != nil {
		return nil, err
	}
	wrapped, err := f.Backend.Wrap(ctx, key, plaintext, b)
	switch f.fault() {
	case "empty wrap":
		return nil, nil
	case "huge wrap":
		return make([]byte, 1<<20), nil
	case "wrap of something else":
		return f.Backend.Wrap(ctx, key, make([]byte, len(plaintext)), b)
	}
	return wrapped, err
}

func (f *faulty) Unwrap(ctx context.Context, key plugins.KeyRef, ciphertext []byte, b plugins.Binding) ([]byte, error) {
	if err := f.goWrong(ctx, "unwrap"); err != nil {
		return nil, err
	}
	switch f.fault() {
	case "empty unwrap":
		return nil, nil
	case "short unwrap":
		return make([]byte, 16), nil
	case "unwrap of something else":
		return make([]byte, 32), nil
	}
	return f.Backend.Unwrap(ctx, key, ciphertext, b)
}

// faultyRig is an agent whose key orders is in a backend that can go wrong;
// archive is in another that cannot.
func faultyRig(t *testing.T) *rig {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	r := newRig(t, "")
	r.write(administrator("backends:\n", fmt.Sprintf(`backends:
  - name: faulty
    path: %s
    sha256: "%s"
    env: { %s: %s }
    access: { read: ["%s"] }
    call_timeout: 300ms
    start_timeout: 2s
    settings: { keystore: "%s", seal: { key_file: "%s" } }
`, program, hex.EncodeToString(hash.Sum(nil)), faultVariable, r.path("fault"), r.dir, r.path("keystore"), r.path("keystore.key")),
		"- { name: orders, backend: local", "- { name: orders, backend: faulty",
		"keys: [orders]", "keys: [orders, archive]"))
	r.fault("none")
	return r
}

func (r *rig) fault(what string) {
	r.t.Helper()
	if err := os.WriteFile(r.path("fault"), []byte(what), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// A backend may go wrong in every call: there is an error that tells, within its
// time; nothing that cannot be opened again is given out; other keys work; and
// all is well when the backend is.
func TestFaultyBackend(t *testing.T) {
	r := faultyRig(t)
	r.start()
	c := r.as("orders")
	good := encryptTo(t, c, "orders")
	for _, what := range []string{
		"hang in wrap", "wait in wrap", "die in wrap", "panic in wrap", "flood in wrap", "error in wrap", "empty wrap", "huge wrap",
		"wrap of something else", "hang in unwrap", "die in unwrap", "panic in unwrap", "error in unwrap", "empty unwrap",
		"short unwrap", "unwrap of something else", "hang in describe", "die in describe", "lie in describe", "error in describe",
	} {
		t.Run(what, func(t *testing.T) {
			r.fault(what)
			if _, err := r.admin().Evict(t.Context(), &adminv1.EvictRequest{All: true}); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
			defer cancel()
			message, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: []byte("x"), MaxStale: durationpb.New(0)})
			if err != nil {
				wantOneOf(t, err, "BACKEND_UNAVAILABLE", "BACKEND_BROKEN", "KEY_SUSPENDED", "KEY_UNUSABLE")
			} else if what != "flood in wrap" && !strings.HasSuffix(what, "in describe") {
				t.Errorf("encrypt: no error")
			}
			// What is known of versions stands while a wrap, which asks too, works.
			if version := message.GetKeyUse().GetKeyVersion(); err == nil && version != "1" {
				t.Errorf("encrypted under version %q, which there is not", version)
			}
			if _, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "archive"}); err != nil {
				t.Errorf("a key in another backend: %v", err)
			}
			r.fault("none")
			r.recovers(c, good)
			if message != nil {
				decryptOf(t, c, message.GetMessage())
			}
		})
	}
	if log := r.auditLog(); strings.Contains(log, "may be a key") {
		t.Error("the value of a panic is on record")
	}
}

// recovers waits until the key works again, with everything asked anew.
func (r *rig) recovers(c *client.Client, message []byte) {
	r.t.Helper()
	var err error
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		_, err = c.Encrypt(r.t.Context(), &kmsagentv1.EncryptRequest{Key: "orders", MaxStale: durationpb.New(0)})
		if err == nil {
			_, err = c.Decrypt(r.t.Context(), &kmsagentv1.DecryptRequest{Message: message})
		}
		if err == nil {
			return
		}
	}
	r.t.Fatalf("the key does not work again: %v", err)
}

func encryptTo(t *testing.T, c *client.Client, key string) []byte {
	t.Helper()
	answer, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: key, Plaintext: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	return answer.GetMessage()
}

func decryptOf(t *testing.T, c *client.Client, message []byte) {
	t.Helper()
	answer, err := c.Decrypt(t.Context(), &kmsagentv1.DecryptRequest{Message: message})
	if err != nil || string(answer.GetPlaintext()) != "x" {
		t.Errorf("what was given out does not open: %v", err)
	}
}

func wantOneOf(t *testing.T, err error, reasons ...string) {
	t.Helper()
	var e *client.Error
	if !errors.As(err, &e) || !slices.Contains(reasons, string(e.Reason)) {
		t.Errorf("error = %v, want one of %v", err, reasons)
	}
}

// A backend may go wrong at each step of its start: the agent is there and says
// so, keys in other backends work, and the backend comes when it can.
func TestBackendThatDoesNotStart(t *testing.T) {
	for _, what := range []string{"exit at start", "rubbish at start", "hang at start", "hang in open", "die in open", "panic in open", "error in open"} {
		t.Run(what, func(t *testing.T) {
			r := faultyRig(t)
			r.fault(what)
			r.startIn("degraded")
			r.await("the other backend", func(s *adminv1.StatusResponse) bool { return s.GetBackends()[1].GetState() == "up" })
			c := r.as("orders")
			_, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
			wantReason(t, err, "BACKEND_UNAVAILABLE")
			if _, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "archive"}); err != nil {
				t.Errorf("a key in another backend: %v", err)
			}
			s := r.await("the cause", func(s *adminv1.StatusResponse) bool { return s.GetBackends()[0].GetLastError() != "" })
			if text := s.GetBackends()[0].GetLastError(); strings.ContainsRune(text, 0x1b) || strings.Contains(text, "may be a key") {
				t.Errorf("the cause holds what the plugin printed as it is: %q", text)
			}
			r.fault("none")
			for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
				if _, err = c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"}); err == nil {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("the backend does not come: %v", err)
				}
			}
		})
	}
}

// A full disk under the audit log: no record, no answer, for nobody; and all is
// well again once there is room.
func TestFullDiskUnderAudit(t *testing.T) {
	r := newRig(t, administrator())
	r.start()
	c := r.as("orders")
	message := encryptTo(t, c, "orders")
	signal.Ignore(unix.SIGXFSZ)
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	limit := func(size uint64) {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: before.Max}); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { limit(before.Cur) })
	limit(uint64(len(r.auditLog())))
	for range 3 {
		_, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
		wantReason(t, err, "AUDIT_UNAVAILABLE")
		answer, err := c.Decrypt(t.Context(), &kmsagentv1.DecryptRequest{Message: message})
		wantReason(t, err, "AUDIT_UNAVAILABLE")
		if answer != nil {
			t.Errorf("an answer without a record: %v", answer)
		}
	}
	// Nor for an administrator, who is told why.
	if _, err := r.status(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "file too large") {
		t.Errorf("status: %v, want why records cannot be written", err)
	}
	limit(before.Cur)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		_, err := c.Decrypt(t.Context(), &kmsagentv1.DecryptRequest{Message: message})
		if err == nil {
			break
		}
		wantReason(t, err, "AUDIT_UNAVAILABLE")
		if time.Now().After(deadline) {
			t.Fatal("the agent does not serve again")
		}
	}
	r.await("no problem any more", func(s *adminv1.StatusResponse) bool {
		return s.GetState() == "serving" && s.GetAudit().GetLastError() == "" && s.GetAudit().GetRefused() > 0
	})
	r.stop()
	if strings.Contains(r.auditLog(), "}{") {
		t.Error("the log holds a torn line")
	}
}
