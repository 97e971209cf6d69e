package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// supervised runs the backend as the agent does, over the fault module.
func (r *rig) supervised(t *testing.T, fault *hsmtest.Fault, change ...func(*host.Config)) *host.Supervisor {
	t.Helper()
	r.settings["module"] = fault.Module
	r.Write("pin", hsmtest.PIN+"\n")
	cfg := plugintest.Config(t, "pkcs11", r.json())
	cfg.Env = append(cfg.Env, r.Env()...)
	cfg.Access.Read, cfg.Access.Write = []string{r.Dir()}, []string{r.Tokens(), r.state(), filepath.Dir(fault.Module)}
	for _, f := range change {
		f(&cfg)
	}
	return plugintest.Start(t, cfg)
}

func keyNamed(name string) plugins.KeyRef {
	return plugins.KeyRef{URI: "pkcs11:token=kms;object=" + name, Version: "1"}
}

// wrapped wraps under a key, as soon as the backend is well.
func wrapsOf(t *testing.T, s *host.Supervisor, name string) (out []byte) {
	t.Helper()
	eventually(t, func() (err error) {
		out, err = s.Wrap(bounded(t), keyNamed(name), make([]byte, 32), message)
		return err
	})
	return out
}

// asAgent is how the agent has its backends.
func asAgent(c *host.Config) { c.CallTimeout = 2 * time.Second }

// twoKeys runs the backend with two keys, a name and "good", and returns what each has wrapped.
func twoKeys(t *testing.T, name string, change ...func(*host.Config)) (s *host.Supervisor, fault *hsmtest.Fault, wrapped, good []byte) {
	t.Helper()
	r := newRig(t)
	for _, key := range []string{name, "good"} {
		r.must(request{Command: "init-key", Key: key})
	}
	fault = hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	s = r.supervised(t, fault, change...)
	return s, fault, wrapsOf(t, s, name), wrapsOf(t, s, "good")
}

// unhurt fails a test where anything but the calls of one key has come to grief.
func unhurt(t *testing.T, s *host.Supervisor, pid int) {
	t.Helper()
	if status := s.Status(); status.PID != pid || status.Breaker.Opened != 0 || status.Breaker.Refused != 0 || status.Retries != 0 {
		t.Errorf("an outage of one key has hurt the backend: %+v", status)
	}
}

// An ill key is no outage of the others, however often it is asked for: not by the breaker
// either, nor where it is the first to be used by a process, which knows no other yet.
func TestIllKeyIsNoOutageOfOthers(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{"bad", "good"} {
		r.must(request{Command: "init-key", Key: name})
	}
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	var bad, good []byte
	t.Run("wrap", func(t *testing.T) {
		s := r.supervised(t, fault)
		bad, good = wrapsOf(t, s, "bad"), wrapsOf(t, s, "good")
	})
	fault.Set("ill /bad/")
	s := r.supervised(t, fault)
	pid := s.Status().PID
	for range 10 {
		for range 10 {
			if _, err := s.Unwrap(bounded(t), keyNamed("bad"), bad, message); !plugins.IsKeyOnly(err) {
				t.Fatalf("the ill key: %v", err)
			}
			if _, err := s.Wrap(bounded(t), keyNamed("bad"), make([]byte, 32), message); !plugins.IsKeyOnly(err) {
				t.Fatalf("Wrap with the ill key: %v", err)
			}
		}
		if _, err := s.Unwrap(bounded(t), keyNamed("good"), good, message); err != nil {
			t.Fatalf("the key beside it: %v", err)
		}
	}
	unhurt(t, s, pid)
	fault.Set()
	eventually(t, func() error {
		_, err := s.Unwrap(bounded(t), keyNamed("bad"), bad, message)
		return err
	})
}

// So it is whatever code the token answers with for it.
func TestIllKeyWithAnyCodeIsNoOutageOfOthers(t *testing.T) {
	for _, code := range []string{"0x30", "0x60"} {
		t.Run(code, func(t *testing.T) {
			s, fault, bad, good := twoKeys(t, "bad")
			pid := s.Status().PID
			fault.Set("ill /bad/", "ill-code "+code)
			for range 20 {
				for range 6 {
					if _, err := s.Unwrap(bounded(t), keyNamed("bad"), bad, message); !plugins.IsKeyOnly(err) {
						t.Fatalf("the ill key: %v", err)
					}
				}
				if _, err := s.Unwrap(bounded(t), keyNamed("good"), good, message); err != nil {
					t.Fatalf("the key beside it: %v", err)
				}
			}
			unhurt(t, s, pid)
		})
	}
}

// So it is with a key that fails slowly while more callers want it than there are sessions:
// those of another key are served, by the same process.
func TestSlowlyIllKeyIsNoOutageOfOthers(t *testing.T) {
	s, fault, bad, good := twoKeys(t, "bad", asAgent)
	pid := s.Status().PID
	fault.Set("ill /bad/", "ill-sleep 300")
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
	defer cancel()
	var callers sync.WaitGroup
	for range 24 {
		callers.Go(func() {
			for ctx.Err() == nil {
				if _, err := s.Unwrap(bounded(t), keyNamed("bad"), bad, message); !plugins.IsKeyOnly(err) {
					t.Errorf("the ill key: %v", err)
					return
				}
				select {
				case <-ctx.Done():
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
	}
	for ctx.Err() == nil {
		if _, err := s.Unwrap(bounded(t), keyNamed("good"), good, message); err != nil {
			t.Errorf("the key beside it: %v", err)
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	callers.Wait()
	unhurt(t, s, pid)
}

// Damaged messages that come together, on a token that takes its time, hurt nobody else.
func TestDamagedMessagesOnASlowToken(t *testing.T) {
	s, fault, orders, good := twoKeys(t, "orders", asAgent)
	damaged := append([]byte(nil), orders...)
	damaged[len(damaged)-1] ^= 1
	pid := s.Status().PID
	fault.Set("C_Decrypt sleep_ms=150", "C_DecryptInit sleep_ms=150")
	var callers sync.WaitGroup
	until := time.Now().Add(5 * time.Second)
	for range 6 {
		callers.Go(func() {
			for time.Now().Before(until) {
				if _, err := s.Unwrap(bounded(t), keyNamed("orders"), damaged, message); plugins.ClassOf(err) != plugins.BadCiphertext {
					t.Errorf("a damaged message: %v", err)
					return
				}
			}
		})
	}
	for name, wrapped := range map[string][]byte{"good": good, "orders": orders} {
		callers.Go(func() {
			for time.Now().Before(until) {
				if _, err := s.Unwrap(bounded(t), keyNamed(name), wrapped, message); err != nil {
					t.Errorf("key %s: %v", name, err)
					return
				}
			}
		})
	}
	callers.Wait()
	unhurt(t, s, pid)
}

// A key that was rotated, and is too ill to wrap in all its versions, is no outage of others.
func TestRotatedIllKeyIsNoOutageOfOthers(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{"good", "bad"} {
		r.must(request{Command: "init-key", Key: name})
	}
	for range 4 {
		r.must(request{Command: "rotate", Key: "bad"})
	}
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	s := r.supervised(t, fault)
	wrapsOf(t, s, "good")
	key := keyNamed("bad")
	for i := range 5 { // all versions are in use
		key.Version = fmt.Sprint(i + 1)
		if _, err := s.Wrap(bounded(t), key, make([]byte, 32), message); err != nil {
			t.Fatal(err)
		}
	}
	pid := s.Status().PID
	fault.Set("ill-wraps /bad/")
	for range 20 {
		for range 6 {
			if _, err := s.Wrap(bounded(t), key, make([]byte, 32), message); !plugins.IsKeyOnly(err) {
				t.Fatalf("Wrap with the ill key: %v", err)
			}
		}
		if _, err := s.Wrap(bounded(t), keyNamed("good"), make([]byte, 32), message); err != nil {
			t.Fatalf("the key beside it: %v", err)
		}
	}
	unhurt(t, s, pid)
}

// A public key that a stranger deletes is an outage of one version's wraps.
func TestPublicKeyThatIsGoneIsNoOutageOfOthers(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "good"})
	id := r.must(request{Command: "init-key", Key: "bad", Suite: "rsa-oaep-sha1"}).Keys[0].Versions[0].ID
	s := r.supervised(t, hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule))
	bad, good := wrapsOf(t, s, "bad"), wrapsOf(t, s, "good")
	pid := s.Status().PID
	r.Run("pkcs11-tool", "--module", hsmtest.SoftHSMModule, "--token-label", hsmtest.Label, "--delete-object", "--type", "pubkey", "--id", id)
	for range 20 {
		for range 5 {
			if _, err := s.Wrap(bounded(t), keyNamed("bad"), make([]byte, 32), message); !plugins.IsKeyOnly(err) || !strings.Contains(err.Error(), "hsm rotate bad") {
				t.Fatalf("Wrap without a public key: %v, want an outage of this key with its cure", err)
			}
		}
		for name, c := range map[string][]byte{"bad": bad, "good": good} {
			if _, err := s.Unwrap(bounded(t), keyNamed(name), c, message); err != nil {
				t.Fatalf("Unwrap with key %s: %v", name, err)
			}
		}
	}
	unhurt(t, s, pid)
	a := r.must(request{Command: "list"})
	for _, k := range a.Keys {
		if problem := k.Versions[0].Problem; strings.Contains(problem, "no public key") != (k.Key == "bad") {
			t.Errorf("list: the problem of %s is %q", k.Key, problem)
		}
	}
}

// Damaged counts are an outage of wraps, and what is wrapped opens under whatever load.
func TestDamagedCountsAreNoOutageOfUnwraps(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	var sealed []byte
	t.Run("wrap", func(t *testing.T) { sealed = wrapsOf(t, r.supervised(t, fault), "orders") })
	if err := os.WriteFile(filepath.Join(r.state(), "wraps.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := r.supervised(t, fault)
	pid := s.Status().PID
	for range 20 {
		for range 5 {
			if _, err := s.Wrap(bounded(t), keyNamed("orders"), make([]byte, 32), message); !plugins.IsKeyOnly(err) || !strings.Contains(err.Error(), "remove the file") {
				t.Fatalf("Wrap: %v, want an outage of wraps with its cure", err)
			}
		}
		if _, err := s.Unwrap(bounded(t), keyNamed("orders"), sealed, message); err != nil {
			t.Fatalf("Unwrap: %v", err)
		}
	}
	unhurt(t, s, pid)
}

// An outage of the token is one of the backend, also where a key is ill.
func TestOutageIsNotOfOneKey(t *testing.T) {
	s, fault, bad, good := twoKeys(t, "bad")
	fault.Set("C_Decrypt rv=0x05", "C_Encrypt rv=0x05")
	eventually(t, func() error {
		_, first := s.Unwrap(bounded(t), keyNamed("bad"), bad, message)
		_, second := s.Unwrap(bounded(t), keyNamed("good"), good, message)
		for _, err := range []error{first, second} {
			if plugins.ClassOf(err) != plugins.Unavailable || plugins.IsKeyOnly(err) {
				t.Errorf("in an outage of the token: %v", err)
			}
		}
		if s.Status().Breaker.Opened == 0 {
			return fmt.Errorf("the breaker is closed: %w", second)
		}
		return nil
	})
}

// A list tells what ails one version, and of the others that they are well, whichever
// comes first.
func TestListWithAnIllKey(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{"aaa", "bbb"} {
		r.must(request{Command: "init-key", Key: name})
	}
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	r.settings["module"] = fault.Module
	for _, ill := range []string{"aaa", "bbb"} {
		fault.Set("ill /" + ill + "/")
		keys := r.must(request{Command: "list"}).Keys
		if len(keys) != 2 {
			t.Fatalf("list: %+v", keys)
		}
		for _, k := range keys {
			problem := k.Versions[0].Problem
			if strings.Contains(problem, "HSM's own log") != (k.Key == ill) || k.Key != ill && problem != "" || strings.Contains(problem, "\n") {
				t.Errorf("%s is ill: the problem of %s is %q", ill, k.Key, problem)
			}
		}
	}
}

// Public keys that cannot be destroyed are told of, and keep no version.
func TestDestroyTellsOfPublicKeys(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders", Suite: "rsa-oaep-sha1"})
	r.must(request{Command: "disable", Key: "orders", Version: 1, Confirmed: true})
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	r.settings["module"] = fault.Module
	fault.Set("C_DestroyObject rv=0x1b skip=2") // CKR_ACTION_PROHIBITED, after the record of before and the private key
	a, said := r.ask(request{Command: "destroy", Key: "orders", Version: 1})
	if a.Error != "" || a.Keys[0].Versions[0].State != "destroyed" || !strings.Contains(string(said), "warning: public keys on the token did not follow") {
		t.Errorf("destroy: %+v\n%s", a, said)
	}
}

// A token that fails slowly is attached again soon, also where many keys are in use.
func TestSlowFailureIsAttachedAgain(t *testing.T) {
	r := newRig(t)
	for i := range 18 {
		r.must(request{Command: "init-key", Key: fmt.Sprintf("k%d", i)})
	}
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	s := r.supervised(t, fault, asAgent)
	var c []byte
	for i := range 18 {
		c = wrapsOf(t, s, fmt.Sprintf("k%d", i))
	}
	fault.Set("C_DecryptInit rv=0x6 sleep_ms=120")
	fault.Calls()
	began := time.Now()
	eventually(t, func() error {
		_, err := s.Unwrap(bounded(t), keyNamed("k17"), c, message)
		if fault.Calls()["C_Initialize"] == 0 {
			return fmt.Errorf("the connection is not made anew: %w", err)
		}
		return nil
	})
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v until the connection was made anew", took)
	}
}
