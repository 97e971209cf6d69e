package hsmtest_test

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

func TestAnswers(t *testing.T) {
	r := newRig(t)
	const failed, again = 0x30, 0x31
	for _, c := range []struct {
		rules []string
		want  []pkcs11.Error // of one call after the other
	}{
		{nil, []pkcs11.Error{0, 0}},
		{[]string{"C_GenerateRandom rv=0x30"}, []pkcs11.Error{failed, failed, failed}},
		{[]string{"C_GenerateRandom rv=48"}, []pkcs11.Error{failed}},
		{[]string{"C_GenerateRandom rv=010"}, []pkcs11.Error{10}},
		{[]string{"C_GenerateRandom rv=0x80000017"}, []pkcs11.Error{0x80000017}},
		{[]string{"C_GenerateRandom rv=0xffffffffffffffff"}, []pkcs11.Error{1<<64 - 1}},
		{[]string{"C_GenerateRandom count=2 rv=0x30"}, []pkcs11.Error{failed, failed, 0, 0}},
		{[]string{"C_GenerateRandom rv=0x30 skip=1 count=1"}, []pkcs11.Error{0, failed, 0, 0}},
		{[]string{"C_GenerateRandom rv=0x30 count=1", "C_GenerateRandom rv=0x31"}, []pkcs11.Error{failed, again, again}},
		{[]string{"C_GenerateRandom rv=0x30 skip=1 count=1", "C_GenerateRandom rv=0x31 count=1"}, []pkcs11.Error{again, failed, 0}},
		{[]string{"C_SeedRandom rv=0x30"}, []pkcs11.Error{0}},
		{[]string{"* rv=0x30 count=1"}, []pkcs11.Error{failed, 0}},
		{[]string{"C_GenerateRandom sleep_ms=1 rv=0x30"}, []pkcs11.Error{failed}},
	} {
		r.Set(c.rules...)
		var got []pkcs11.Error
		for range c.want {
			got = append(got, code(r.random()))
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%v (-want +got):\n%s", c.rules, diff)
		}
	}
}

// A call that a rule answers is not made, also where the answer is that all is well.
func TestAnsweredCallIsNotMade(t *testing.T) {
	r := newRig(t)
	r.Set("C_GenerateRandom rv=0")
	if got, err := r.GenerateRandom(r.session, 32); err != nil || !bytes.Equal(got, make([]byte, 32)) {
		t.Errorf("GenerateRandom: %x, %v; want what was in the buffer", got, err)
	}
}

// However fast they follow each other: rules count from when they are set.
func TestSetStartsAnew(t *testing.T) {
	r := newRig(t)
	for i := range 200 {
		r.Set("C_GenerateRandom rv=0x30 count=1")
		if err := r.random(); code(err) != 0x30 {
			t.Fatalf("round %d: %v", i, err)
		}
		if err := r.random(); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
	}
}

func TestAsManyRulesAsPossible(t *testing.T) {
	r := newRig(t)
	rules := make([]string, 64)
	for i := range rules {
		rules[i] = fmt.Sprintf("C_GenerateRandom rv=%d count=1", i+1)
	}
	r.Set(rules...)
	for i := range rules {
		r.wantCode(rules[i], r.random(), pkcs11.Error(i+1))
	}
}

func TestSleep(t *testing.T) {
	r := newRig(t)
	r.Set("C_GenerateRandom sleep_ms=80 count=1")
	began := time.Now()
	got, err := r.GenerateRandom(r.session, 32)
	if took := time.Since(began); took < 80*time.Millisecond {
		t.Errorf("it took %v, want 80 ms", took)
	}
	if err != nil || bytes.Equal(got, make([]byte, 32)) {
		t.Errorf("GenerateRandom: %x, %v; want that the call is made", got, err)
	}
}

// A process that uses the module ends as the rule says, or does not.
func TestEndOfProcess(t *testing.T) {
	hsmtest.NewSoftHSM(t)
	fault := hsmtest.NewFault(t, "..", hsmtest.SoftHSMModule)
	for _, c := range []struct {
		rules []string
		tells string
		exit  int
		hangs bool
	}{
		{},
		{rules: []string{"C_Initialize rv=0x30 count=1"}, exit: 10}, // in each process once
		{rules: []string{"C_Initialize rv=0x30 count=1"}, exit: 10},
		{rules: []string{"C_Finalize rv=0x30"}, exit: 11},
		{rules: []string{"C_Initialize exit=3"}, exit: 3},
		{rules: []string{"C_Initialize exit=0"}},
		{rules: []string{"C_Initialize segv"}, tells: "SIGSEGV: segmentation violation", exit: 2},
		{rules: []string{"C_Initialize abort"}, tells: "SIGABRT: abort", exit: 2},
		{rules: []string{"C_Initialize hang"}, hangs: true},
	} {
		t.Run(strings.Join(c.rules, ","), func(t *testing.T) {
			fault.Set(c.rules...)
			cmd, output := start(t, fault)
			if c.hangs {
				waitForCall(t, fault, "C_Initialize")
				time.Sleep(100 * time.Millisecond) // in which it would end
				_ = cmd.Process.Kill()
				if _ = cmd.Wait(); !strings.Contains(cmd.ProcessState.String(), "killed") {
					t.Errorf("it ended with %v, want that it ends by being killed", cmd.ProcessState)
				}
				return
			}
			_ = cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); got != c.exit || !strings.Contains(output.String(), c.tells) {
				t.Errorf("it ended with %v, want %d and %q:\n%s", cmd.ProcessState, c.exit, c.tells, output)
			}
		})
	}
}

func start(t *testing.T, fault *hsmtest.Fault) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	var output bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(cmd.Environ(), childVariable+"="+fault.Module)
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, &output
}

func waitForCall(t *testing.T, fault *hsmtest.Fault, function string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if fault.Calls()[function] > 0 {
			return
		}
	}
	t.Fatalf("%s was not called within 20 s", function)
}

// A connection that is lost comes back only where the application finalizes and the
// rules have changed, in whatever order.
func TestDead(t *testing.T) {
	for _, finalizeFirst := range []bool{true, false} {
		t.Run(fmt.Sprintf("finalizeFirst=%v", finalizeFirst), func(t *testing.T) {
			r := newRig(t)
			r.Set("dead", "C_GenerateRandom rv=0")
			r.wantCode("C_GenerateRandom", r.random(), pkcs11.CKR_DEVICE_ERROR)
			_, err := r.GetSlotList(true)
			r.wantCode("C_GetSlotList", err, pkcs11.CKR_DEVICE_ERROR)
			r.wantCode("C_Initialize", r.Initialize(), pkcs11.CKR_DEVICE_ERROR)
			if finalizeFirst {
				r.wantCode("C_Finalize", r.Finalize(), 0)
				r.wantCode("C_Initialize while it is dead", r.Initialize(), pkcs11.CKR_DEVICE_ERROR)
				r.Set()
			} else {
				r.Set()
				r.wantCode("C_GenerateRandom before C_Finalize", r.random(), pkcs11.CKR_DEVICE_ERROR)
				r.wantCode("C_Initialize before C_Finalize", r.Initialize(), pkcs11.CKR_DEVICE_ERROR)
				r.wantCode("C_Finalize", r.Finalize(), 0)
			}
			r.connect()
			r.wantCode("C_GenerateRandom when all is well again", r.random(), 0)
		})
	}
}

func TestNoSlots(t *testing.T) {
	r := newRig(t)
	r.Set("no-slots")
	if slots, err := r.GetSlotList(true); err != nil || len(slots) != 0 {
		t.Errorf("GetSlotList: %v, %v; want none", slots, err)
	}
	r.wantCode("C_GenerateRandom", r.random(), 0)
	r.Set()
	if slots, err := r.GetSlotList(true); err != nil || len(slots) == 0 {
		t.Errorf("GetSlotList: %v, %v; want some", slots, err)
	}
}

func TestLossy(t *testing.T) {
	r := newRig(t)
	key, iv, plaintext := r.key(), []byte("twelve bytes"), []byte("some plaintext")
	ciphertext, _ := r.encrypt(r.session, key, iv, plaintext)
	r.Set("lossy")
	got, err := r.decrypt(key, iv, ciphertext)
	if err != nil || len(got) != len(plaintext) || bytes.Equal(got, plaintext) {
		t.Errorf("Decrypt: %q, %v; want another plaintext", got, err)
	}
	r.Set()
	if got, err := r.decrypt(key, iv, ciphertext); err != nil || !bytes.Equal(got, plaintext) {
		t.Errorf("Decrypt without the rule: %q, %v", got, err)
	}
}

// Every call counts once, also while others are counted and in other processes.
func TestCalls(t *testing.T) {
	r := newRig(t)
	const workers, each = 4, 200
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				if err := r.random(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	got := 0
	for working := true; working; {
		select {
		case <-done:
			working = false
		default:
		}
		got += r.Calls()["C_GenerateRandom"]
	}
	if want := workers * each; got != want {
		t.Errorf("%d calls were counted, want %d", got, want)
	}
	cmd, output := start(t, r.Fault)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	if diff := cmp.Diff(map[string]int{"C_Initialize": 1, "C_Finalize": 1}, r.Calls()); diff != "" {
		t.Errorf("calls of another process (-want +got):\n%s", diff)
	}
	if got := r.Calls(); len(got) != 0 {
		t.Errorf("calls are counted twice: %v", got)
	}
}

// Goroutines that call while the rules change: what they get is of the one or the
// other.
func TestSetWhileInUse(t *testing.T) {
	r := newRig(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 200 {
				if got := code(r.random()); got != 0 && got != 0x30 && got != 0x31 {
					t.Errorf("GenerateRandom: %v", got)
				}
			}
		})
	}
	for range 100 {
		r.Set("C_GenerateRandom rv=0x30", "iv fixed", "lossy")
		r.Set("C_GenerateRandom rv=0x31", "no-slots")
		r.Set()
	}
	wg.Wait()
}

// What passes is passed, what is not supported says so, and both obey rules.
func TestFunctions(t *testing.T) {
	r := newRig(t)
	for function, call := range map[string]func() error{
		"C_InitPIN":           func() error { return r.InitPIN(r.session, "1234") },
		"C_SetPIN":            func() error { return r.SetPIN(r.session, "1234", "5678") },
		"C_GetOperationState": func() error { _, err := r.GetOperationState(r.session); return err },
		"C_CopyObject":        func() error { _, err := r.CopyObject(r.session, 1, nil); return err },
		"C_GetObjectSize":     func() error { _, err := r.GetObjectSize(r.session, 1); return err },
		"C_EncryptUpdate":     func() error { _, err := r.EncryptUpdate(r.session, []byte{1}); return err },
		"C_DigestInit": func() error {
			return r.DigestInit(r.session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_SHA256, nil)})
		},
		"C_SignUpdate": func() error { return r.SignUpdate(r.session, []byte{1}) },
		"C_SeedRandom": func() error { return r.SeedRandom(r.session, []byte{1}) },
	} {
		r.wantCode(function, call(), pkcs11.CKR_FUNCTION_NOT_SUPPORTED)
		r.Set(function + " rv=0x30")
		r.wantCode(function+" with a rule", call(), pkcs11.CKR_DEVICE_ERROR)
		r.Set()
		if n := r.Calls()[function]; n != 2 {
			t.Errorf("%s: %d calls, want 2", function, n)
		}
	}
	r.wantCode("C_Logout", r.Logout(r.session), 0)
	const public = 2 // CKS_RW_PUBLIC_SESSION
	if info, err := r.GetSessionInfo(r.session); err != nil || info.State != public {
		t.Errorf("after C_Logout: %+v, %v", info, err)
	}
	r.wantCode("C_Login", r.Login(r.session, pkcs11.CKU_USER, hsmtest.PIN), 0)
	r.wantCode("C_CloseAllSessions", r.CloseAllSessions(r.slot), 0)
	r.wantCode("C_GenerateRandom after it", r.random(), pkcs11.CKR_SESSION_HANDLE_INVALID)
}

// Modules of one test binary are of one compilation, and know nothing of each other.
func TestModulesOfATest(t *testing.T) {
	first := hsmtest.NewFault(t, "..", hsmtest.SoftHSMModule)
	t.Setenv("PATH", t.TempDir())
	second := hsmtest.NewFault(t, "..", hsmtest.SoftHSMModule)
	a, b := pkcs11.New(first.Module), pkcs11.New(second.Module)
	defer a.Destroy()
	defer b.Destroy()
	first.Set("C_GetInfo rv=0x30")
	second.Set("C_GetInfo rv=0x31", "C_GetSlotList rv=0x32")
	_, errA := a.GetInfo()
	_, errB := b.GetInfo()
	if code(errA) != 0x30 || code(errB) != 0x31 {
		t.Errorf("C_GetInfo: %v and %v", errA, errB)
	}
	if diff := cmp.Diff(map[string]int{"C_GetInfo": 1}, first.Calls()); diff != "" {
		t.Errorf("calls of the first (-want +got):\n%s", diff)
	}
}

func TestNoModuleBehind(t *testing.T) {
	for _, path := range []string{"/nowhere.so", "/proc/self/exe", ""} {
		fault := hsmtest.NewFault(t, "..", path)
		if _, err := cryptoki.Load(fault.Module); err == nil || !strings.Contains(err.Error(), "C_GetFunctionList") {
			t.Errorf("before %q: %v", path, err)
		}
	}
}
