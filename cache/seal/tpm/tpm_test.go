package tpm_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/kms-agent/kms-agent/cache/seal"
	"github.com/kms-agent/kms-agent/cache/seal/tpm"
)

// The store survives a reboot and a power failure, and an older one is refused
// after either.
func TestSurvivesTheBoot(t *testing.T) {
	e, path := newEmulator(t), filepath.Join(t.TempDir(), "store")
	s := e.open(t)
	save(t, path, s, "old")
	old, err := os.ReadFile(path)
	must(t, err)
	save(t, path, s, "a data key")
	newest, err := os.ReadFile(path)
	must(t, err)
	s.Close()
	for _, by := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		e.end(by)
		e.boot(t)
		s := e.open(t)
		if got, err := load(path, s); err != nil || got != "a data key" {
			t.Errorf("after %s: got %q, %v, want the data key", by, got, err)
		}
		must(t, os.WriteFile(path, old, 0o600))
		if _, err := load(path, s); !errors.Is(err, seal.ErrRolledBack) {
			t.Errorf("after %s, rolled back: got %v, want ErrRolledBack", by, err)
		}
		must(t, os.WriteFile(path, newest, 0o600))
		s.Close()
	}
}

func TestAnotherTPM(t *testing.T) {
	one, other, path := newEmulator(t), newEmulator(t), filepath.Join(t.TempDir(), "store")
	save(t, path, one.open(t), "a data key")
	if _, err := load(path, other.open(t)); !errors.Is(err, seal.ErrForeign) {
		t.Errorf("got %v, want ErrForeign", err)
	}
}

func TestClearedTPM(t *testing.T) {
	e, path := newEmulator(t), filepath.Join(t.TempDir(), "store")
	s := e.open(t)
	save(t, path, s, "a data key")
	execute(t, e, tpm2.Clear{AuthHandle: tpm2.TPMRHLockout})
	if _, err := s.Counter(); !errors.Is(err, seal.ErrUnavailable) || !strings.Contains(err.Error(), "restart the agent") {
		t.Errorf("Counter: got %v, want ErrUnavailable with the cure", err)
	}
	if _, err := load(path, e.open(t)); !errors.Is(err, seal.ErrForeign) {
		t.Errorf("Load: got %v, want ErrForeign", err)
	}
}

// A counter that is deleted and made again is above all that it was before.
func TestCounterMadeAgain(t *testing.T) {
	e, path := newEmulator(t), filepath.Join(t.TempDir(), "store")
	s := e.open(t)
	save(t, path, s, "a", "b", "c", "d")
	before := counter(t, s)
	public := execute(t, e, tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(tpm.DefaultIndex)})
	execute(t, e, tpm2.NVUndefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		NVIndex:    tpm2.NamedHandle{Handle: tpm.DefaultIndex, Name: public.NVName},
	})
	again := e.open(t)
	if got := counter(t, again); got <= before {
		t.Errorf("made again, the counter is %d, not above %d", got, before)
	}
	if _, err := load(path, again); !errors.Is(err, seal.ErrRolledBack) {
		t.Errorf("Load: got %v, want ErrRolledBack", err)
	}
}

// One write of the TPM's memory for each Save and one more for the first, none
// for anything else.
func TestWear(t *testing.T) {
	e, path := newEmulator(t), filepath.Join(t.TempDir(), "store")
	s := e.open(t)
	start := counter(t, s)
	save(t, path, s, "a", "b", "c")
	if got := counter(t, s) - start; got != 4 {
		t.Errorf("3 Saves moved the counter by %d, want 4", got)
	}
	for range 3 {
		again := e.open(t)
		_, err := load(path, again)
		must(t, err)
		again.Close()
	}
	if got := counter(t, s) - start; got != 4 {
		t.Errorf("starting and loading moved the counter by %d", got-4)
	}
}

// A TPM locked out by somebody's wrong passwords goes on serving this one.
func TestLockout(t *testing.T) {
	e, path := newEmulator(t), filepath.Join(t.TempDir(), "store")
	lockOut(t, e)
	save(t, path, e.open(t), "a data key")
	if got, err := load(path, e.open(t)); err != nil || got != "a data key" {
		t.Errorf("got %q, %v, want the data key", got, err)
	}
}

// lockOut makes the TPM allow no tries, and makes sure that it is locked out.
func lockOut(t *testing.T, e *emulator) {
	t.Helper()
	device, err := linuxudstpm.Open(e.socket)
	must(t, err)
	// TPM2_DictionaryAttackParameters, which the library does not have: header,
	// TPM_RH_LOCKOUT, an empty password, then maxTries, recoveryTime, lockoutRecovery.
	command, err := hex.DecodeString("8002" + "00000027" + "0000013a" + "4000000a" + "00000009" + "40000009" + "0000" + "00" + "0000" +
		"00000000" + "00001000" + "00001000")
	must(t, err)
	response, err := device.Send(command)
	must(t, err)
	if len(response) < 10 || binary.BigEndian.Uint32(response[6:]) != 0 {
		t.Fatalf("TPM2_DictionaryAttackParameters: got % x", response)
	}
	protected := tpm2.NVDefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: tpm.FirstIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
			Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true, NT: tpm2.TPMNTCounter},
		}),
	}
	_, err = protected.Execute(device)
	must(t, err)
	public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(tpm.FirstIndex)}.Execute(device)
	must(t, err)
	_, err = tpm2.NVIncrement{
		AuthHandle: tpm2.AuthHandle{Handle: tpm.FirstIndex, Name: public.NVName, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: tpm.FirstIndex, Name: public.NVName},
	}.Execute(device)
	if !errors.Is(err, tpm2.TPMRCLockout) {
		t.Fatalf("what is not exempt: got %v, want TPM_RC_LOCKOUT", err)
	}
}

// Nothing stays loaded in the TPM.
func TestLeavesNoHandles(t *testing.T) {
	e, path := newEmulator(t), filepath.Join(t.TempDir(), "store")
	save(t, path, e.open(t), "a")
	s := e.open(t)
	_, err := load(path, s)
	must(t, err)
	_, _ = s.Open(nil, damagedObject(t, s), nil)
	for what, first := range map[string]uint32{"objects": 0x80000000, "sessions": 0x02000000, "persistent objects": 0x81000000} {
		got := execute(t, e, tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 16})
		handles, err := got.CapabilityData.Data.Handles()
		must(t, err)
		if len(handles.Handle) != 0 {
			t.Errorf("%s left: %#x", what, handles.Handle)
		}
	}
}

// damagedObject is something sealed whose secret the TPM does not load.
func damagedObject(t *testing.T, s *tpm.Sealer) []byte {
	t.Helper()
	sealed, err := s.Seal(nil, []byte("x"), nil)
	must(t, err)
	b := bytes.Clone(sealed)
	b[len(b)-1-28-16-1] ^= 1 // the private area's last byte
	return b
}

func TestDamagedObjects(t *testing.T) {
	s := newEmulator(t).open(t)
	sealed, err := s.Seal([]byte("prefix"), []byte("secret"), []byte("aad"))
	must(t, err)
	sealed = sealed[len("prefix"):]
	if len(sealed) > seal.Overhead+len("secret") {
		t.Errorf("sealed is %d bytes", len(sealed))
	}
	if got, err := s.Open(nil, sealed, []byte("aad")); err != nil || string(got) != "secret" {
		t.Errorf("Open: got %q, %v", got, err)
	}
	if _, err := s.Open(nil, sealed, []byte("other")); !errors.Is(err, seal.ErrDamaged) {
		t.Errorf("other aad: got %v, want ErrDamaged", err)
	}
	for i := range sealed[:min(len(sealed), 400)] {
		if i%5 == 0 {
			b := bytes.Clone(sealed)
			b[i] ^= 0x10
			if _, err := s.Open(nil, b, []byte("aad")); !errors.Is(err, seal.ErrDamaged) && !errors.Is(err, seal.ErrForeign) {
				t.Errorf("changed at %d: got %v, want ErrDamaged or ErrForeign", i, err)
			}
		}
		if _, err := s.Open(nil, sealed[:i], []byte("aad")); !errors.Is(err, seal.ErrDamaged) {
			t.Errorf("cut at %d: got %v, want ErrDamaged", i, err)
		}
	}
	if got, err := s.Open(nil, sealed, []byte("aad")); err != nil || string(got) != "secret" {
		t.Errorf("Open afterwards: got %q, %v", got, err)
	}
}

// Each reason why there is no TPM is told with its cure.
func TestCures(t *testing.T) {
	e := newEmulator(t)
	plain := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(plain, nil, 0o600))
	execute(t, e, tpm2.NVDefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: tpm.FirstIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
			Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true, NT: tpm2.TPMNTOrdinary},
		}),
	})
	for _, c := range []struct {
		config tpm.Config
		want   string
	}{
		{tpm.Config{Device: "/nonexistent/tpm"}, "no TPM 2.0"},
		{tpm.Config{Device: plain}, "not a socket"},
		{tpm.Config{Device: e.socket, Index: tpm.FirstIndex}, "configure another"},
		{tpm.Config{Device: e.socket, Index: tpm.LastIndex + 1}, "use one from 0x1800000 to 0x1bfffff"},
	} {
		if _, err := tpm.Open(c.config); !errors.Is(err, seal.ErrUnavailable) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %v, want ErrUnavailable that says %q", c.config, err, c.want)
		}
	}
	execute(t, e, tpm2.HierarchyChangeAuth{AuthHandle: tpm2.TPMRHOwner, NewAuth: tpm2.TPM2BAuth{Buffer: []byte("owner")}})
	if _, err := tpm.Open(tpm.Config{Device: e.socket}); !errors.Is(err, seal.ErrUnavailable) || !strings.Contains(err.Error(), "tpm2_changeauth") {
		t.Errorf("owner's authorization: got %v, want ErrUnavailable with the cure", err)
	}
}

func TestTPMThatGoesAway(t *testing.T) {
	e, path := newEmulator(t), filepath.Join(t.TempDir(), "store")
	s := e.open(t)
	save(t, path, s, "a data key")
	other := e.open(t)
	e.end(syscall.SIGKILL)
	if _, err := s.Advance(); !errors.Is(err, seal.ErrUnavailable) {
		t.Errorf("Advance: got %v, want ErrUnavailable", err)
	}
	if _, err := load(path, other); !errors.Is(err, seal.ErrUnavailable) {
		t.Errorf("Load: got %v, want ErrUnavailable", err)
	}
	s.Close()
	s.Close()
	if _, err := s.Seal(nil, nil, nil); !errors.Is(err, seal.ErrUnavailable) {
		t.Errorf("Seal after Close: got %v, want ErrUnavailable", err)
	}
}
