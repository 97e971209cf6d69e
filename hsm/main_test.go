package hsm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

func TestMain(m *testing.M) {
	if order := os.Getenv(strangerVariable); order != "" {
		if err := stranger(order); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

const (
	softHSM = hsmtest.SoftHSMModule
	userPIN = hsmtest.PIN
)

// rig is a SoftHSM token in a directory of its own, and a Token attached to it.
type rig struct {
	*hsm.Token

	t    testing.TB
	soft *hsmtest.SoftHSM

	mu     sync.Mutex
	events []hsm.Event
}

func (r *rig) path(name string) string { return r.soft.Path(name) }

func (r *rig) write(name, content string) {
	r.t.Helper()
	r.soft.Write(name, content)
}

func (r *rig) run(name string, args ...string) {
	r.t.Helper()
	r.soft.Run(name, args...)
}

// tool runs pkcs11-tool, as another application of the token.
func (r *rig) tool(args ...string) {
	r.t.Helper()
	r.soft.Tool(args...)
}

// newRig makes a token; change may change how it is used.
func newRig(t testing.TB, change ...func(*rig, *hsm.Config)) *rig {
	t.Helper()
	return (&rig{t: t, soft: hsmtest.NewSoftHSM(t)}).open(change...)
}

// open attaches the rig to its token.
func (r *rig) open(change ...func(*rig, *hsm.Config)) *rig {
	t := r.t
	t.Helper()
	cfg := hsm.Config{
		Module: softHSM, Token: hsm.URI{Token: hsmtest.Label},
		Login:  &hsm.Ledger{Path: r.path("logins"), PIN: hsm.PINSource{File: r.soft.PINFile()}},
		Events: r.happened,
	}
	for _, f := range change {
		f(r, &cfg)
	}
	token, err := hsm.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Token = token
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	eventually(t, "the token is attached", func() error { return token.Check(t.Context()) })
	return r
}

func (r *rig) happened(e hsm.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

// keepsConnection fails a test in which the token was attached again.
func (r *rig) keepsConnection() {
	r.t.Helper()
	if n := r.attached(); n != 1 {
		r.t.Errorf("it took %d connections, want 1", n)
	}
}

// attached returns how often the token was attached.
func (r *rig) attached() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, e := range r.events {
		if e.Attached {
			n++
		}
	}
	return n
}

func bounded(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// key makes a key and returns its first version.
func (r *rig) key(name string, suite hsm.Suite) *hsm.Version {
	r.t.Helper()
	k, err := r.CreateKey(bounded(r.t), name, suite)
	if err != nil {
		r.t.Fatalf("CreateKey: %v", err)
	}
	return k.Versions[0]
}

var bound = []byte("what is bound")

func (r *rig) wrap(v *hsm.Version, material []byte) []byte {
	r.t.Helper()
	wrapped, err := r.Wrap(bounded(r.t), v, nil, material, bound)
	if err != nil {
		r.t.Fatalf("Wrap: %v", err)
	}
	return wrapped
}

func (r *rig) opens(v *hsm.Version, wrapped, want []byte) {
	r.t.Helper()
	got, err := r.Unwrap(bounded(r.t), v, nil, wrapped, bound)
	if err != nil || !bytes.Equal(got, want) {
		r.t.Fatalf("Unwrap: %d bytes, %v; want the %d that were wrapped", len(got), err, len(want))
	}
}

func (r *rig) fails(v *hsm.Version, wrapped []byte, want hsm.Kind) error {
	r.t.Helper()
	got, err := r.Unwrap(bounded(r.t), v, nil, wrapped, bound)
	if hsm.KindOf(err) != want || got != nil {
		r.t.Errorf("Unwrap: %d bytes, %v; want %v", len(got), err, want)
	}
	return err
}

// eventually waits for what the token brings about by itself.
func eventually(t testing.TB, what string, is func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = is(); err == nil {
			return
		}
	}
	t.Fatalf("%s: not within 20 s: %v", what, err)
}

// underWay waits until the module has been called.
func underWay(t testing.TB, fault *hsmtest.Fault, function string) {
	t.Helper()
	eventually(t, function+" is under way", func() error { return errorUnless(fault.Calls()[function] > 0, nil, "nobody has called it") })
}

// crowd is callers who do the same again and again until a time.
type crowd struct {
	until time.Time
	wg    sync.WaitGroup
}

func newCrowd(length time.Duration) *crowd { return &crowd{until: time.Now().Add(length)} }

// add adds n callers, with a pause after each call of theirs.
func (c *crowd) add(n int, pause time.Duration, call func()) {
	for range n {
		c.wg.Go(func() {
			for time.Now().Before(c.until) {
				call()
				time.Sleep(pause)
			}
		})
	}
}

func material(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}
