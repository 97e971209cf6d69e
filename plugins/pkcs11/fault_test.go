package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

var orders = plugins.KeyRef{URI: "pkcs11:token=kms;object=orders", Version: "1"}

// faulty is how the backend is run in a process of its own, confined, behind the fault
// module.
func faulty(t *testing.T, pin string) (host.Config, *hsmtest.Fault) {
	t.Helper()
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	r.settings["module"], r.settings["hang_after"] = fault.Module, "500ms"
	r.Write("pin", pin+"\n")
	cfg := plugintest.Config(t, "pkcs11", r.json())
	cfg.Env = append(cfg.Env, r.Env()...)
	cfg.Access.Read, cfg.Access.Write = []string{r.Dir()}, []string{r.Tokens(), r.state(), filepath.Dir(fault.Module)}
	cfg.BackoffMin, cfg.BackoffMax = 10*time.Millisecond, 100*time.Millisecond
	return cfg, fault
}

// A module that crashes, ends the process or never comes back takes the process with
// it, and nothing else: the next one serves, without anybody's doing.
func TestProcessIsReplaced(t *testing.T) {
	const lost = "C_Decrypt rv=0x30"
	for _, rules := range [][]string{
		{"C_Decrypt segv"}, {"C_Decrypt abort"}, {"C_Decrypt exit=3"}, {"C_Decrypt hang"}, {"C_DecryptInit hang"}, {"C_Decrypt sleep_ms=60000"},
		// While it climbs the ladder.
		{lost, "C_CloseSession hang"}, {lost, "C_CloseAllSessions hang"}, {lost, "C_Finalize hang"}, {lost, "C_Finalize segv"},
		{lost, "C_Initialize hang"}, {lost, "C_GetSlotList hang"}, {lost, "C_OpenSession hang"}, {lost, "C_Login hang"}, {"logged-out", "C_Login hang"},
	} {
		t.Run(strings.Join(rules, ", "), func(t *testing.T) {
			cfg, fault := faulty(t, hsmtest.PIN)
			s := plugintest.Start(t, cfg)
			material := bytes.Repeat([]byte{7}, 32)
			var wrapped []byte
			eventually(t, func() (err error) {
				wrapped, err = s.Wrap(bounded(t), orders, material, plugins.Binding{Purpose: "message"})
				return err
			})
			pid := s.Status().PID
			fault.Set(rules...)
			if _, err := s.Unwrap(bounded(t), orders, wrapped, plugins.Binding{Purpose: "message"}); plugins.ClassOf(err) != plugins.Unavailable {
				t.Errorf("Unwrap: %v, want Unavailable", err)
			}
			fault.Set()
			eventually(t, func() error {
				got, err := s.Unwrap(bounded(t), orders, wrapped, plugins.Binding{Purpose: "message"})
				if err == nil && !bytes.Equal(got, material) {
					t.Fatal("it opens to something else")
				}
				return err
			})
			if s.Status().PID == pid {
				t.Errorf("process %d goes on", pid)
			}
		})
	}
}

// A module that hangs when it is initialised for the first time, or before the first
// login, is given up too, as often as it does.
func TestHangAtTheStart(t *testing.T) {
	for _, rule := range []string{"C_Initialize hang", "C_GetTokenInfo hang", "C_OpenSession hang"} {
		t.Run(rule, func(t *testing.T) {
			cfg, fault := faulty(t, hsmtest.PIN)
			fault.Set(rule)
			s, err := host.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() { ended <- s.Run(ctx) }()
			t.Cleanup(func() {
				cancel()
				if err := <-ended; !errors.Is(err, context.Canceled) {
					t.Errorf("Run: %v", err)
				}
			})
			processes := 0
			eventually(t, func() error {
				if processes += fault.Calls()["C_Initialize"]; processes < 3 {
					return fmt.Errorf("%d processes", processes)
				}
				return nil
			})
			fault.Set()
			eventually(t, func() error {
				_, err := s.Wrap(bounded(t), orders, make([]byte, 32), plugins.Binding{Purpose: "message"})
				return err
			})
		})
	}
}

// However often the process is started: a wrong PIN is tried once.
func TestAWrongPINIsTriedOnce(t *testing.T) {
	cfg, fault := faulty(t, "not the PIN")
	s := unready(t, cfg)
	for range 4 {
		eventually(t, func() error {
			_, err := s.Wrap(bounded(t), orders, make([]byte, 32), plugins.Binding{Purpose: "message"})
			if plugins.ClassOf(err) != plugins.Unauthenticated {
				return errors.Join(errors.New("want Unauthenticated"), err)
			}
			return nil
		})
		if err := s.Replace(bounded(t)); err != nil {
			t.Fatal(err)
		}
	}
	if n := fault.Calls()["C_Login"]; n != 1 {
		t.Errorf("the PIN was tried %d times", n)
	}
}

// unready runs a supervisor whose backend need not be well.
func unready(t *testing.T, cfg host.Config) *host.Supervisor {
	t.Helper()
	s, err := host.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}

func eventually(t *testing.T, is func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = is(); err == nil {
			return
		}
	}
	t.Fatalf("not within 20 s: %v", err)
}

// What goes wrong with a token's random is told by its class, ends in the caller's time,
// and costs neither the process nor anybody's wrap.
func TestRandomGoesWrong(t *testing.T) {
	cfg, fault := faulty(t, hsmtest.PIN)
	s := plugintest.Start(t, cfg)
	material, pid := bytes.Repeat([]byte{7}, 32), s.Status().PID
	wraps := func() error {
		_, err := s.Wrap(bounded(t), orders, material, plugins.Binding{Purpose: "message"})
		return err
	}
	eventually(t, wraps)
	for _, c := range []struct {
		rule string
		time time.Duration
		want plugins.Class
	}{
		{"C_GenerateRandom rv=0", 20 * time.Second, plugins.Internal}, // zeros
		{"C_GenerateRandom rv=0x121", 20 * time.Second, plugins.Invalid},
		{"C_GenerateRandom rv=0x05", 20 * time.Second, plugins.Unavailable},
		{"C_GenerateRandom sleep_ms=300", 150 * time.Millisecond, plugins.Unavailable},
	} {
		fault.Set(c.rule)
		ctx, cancel := context.WithTimeout(t.Context(), c.time)
		dst := make([]byte, 32)
		err := s.Random(ctx, dst)
		cancel()
		if plugins.ClassOf(err) != c.want || !bytes.Equal(dst, make([]byte, 32)) {
			t.Errorf("%s: %x and %v, want %s", c.rule, dst, err, c.want)
		}
		if err := wraps(); err != nil {
			t.Errorf("%s: a wrap: %v", c.rule, err)
		}
		fault.Set()
		eventually(t, func() error { return s.Random(bounded(t), dst) })
	}
	if now := s.Status().PID; now != pid {
		t.Errorf("process %d was replaced by %d", pid, now)
	}
}
