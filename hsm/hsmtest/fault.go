// Package hsmtest has what tests of HSMs need: a token of SoftHSM, the same at the
// other end of a wire, and a module that misbehaves as it is told, before a real one.
package hsmtest

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Fault is a PKCS#11 module that passes its calls to another one, and does what its
// rules say instead. Its files are in the directory of Module, all it needs: a
// confined process that loads it may write there. Several goroutines may use a Fault.
type Fault struct {
	// Module is its path, one for each Fault: rules, counts and calls are its own.
	Module string

	t     testing.TB
	mu    sync.Mutex // guards what follows
	sets  int64
	calls *os.File // at what Calls has not read yet
	rest  []byte   // of a line that was not complete
}

// NewFault puts a module before the one at path, which behaves until there are rules.
// hsmDir is the directory of package hsm, seen from the test.
func NewFault(t testing.TB, hsmDir, path string) *Fault {
	t.Helper()
	module, err := faultModule(hsmDir)
	if err != nil {
		t.Fatal(err)
	}
	// A file for each: of one that several load, they would share the state.
	f := &Fault{Module: filepath.Join(t.TempDir(), "fault.so"), t: t}
	if err := os.WriteFile(f.Module, module, 0o700); err != nil { //nolint:gosec // it is executed
		t.Fatal(err)
	}
	if err := os.WriteFile(f.file("module"), []byte(path+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if f.calls, err = os.OpenFile(f.file("calls"), os.O_RDONLY|os.O_CREATE, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.calls.Close() })
	f.Set()
	return f
}

func (f *Fault) file(name string) string { return filepath.Join(filepath.Dir(f.Module), name) }

// Set replaces the rules, for the next call on; their counts begin anew. Without any
// the module behaves. Each process counts for itself. A rule is one of
//
//	FUNCTION [skip=N] [count=N] [sleep_ms=N] [rv=N | segv | abort | exit=N | hang]
//	dead       the connection is lost: every call is CKR_DEVICE_ERROR until the rules
//	           are others and C_Finalize was called
//	no-slots   C_GetSlotList is well and empty
//	lossy      C_Decrypt changes a bit of what it gives
//	logged-out nobody is logged in, until C_Login: CKR_USER_NOT_LOGGED_IN
//	boast N    what has a count or a length in its answer says N
//	slots N    the numbers of slots are others, by N
//	iv STYLE   what becomes of the vectors of CKM_AES_GCM
//	reused LABEL  a handle of no key, as after a login again, is that of the key with this
//	              label, and other keys' ciphertexts are CKR_ENCRYPTED_DATA_INVALID
//	ill LABEL  keys with this in their label neither encrypt nor decrypt: a vendor's code
//	ill-wraps LABEL  the same, and they decrypt
//	ill-opens LABEL  the same, and they encrypt
//	ill-code N       with this code, in place of the vendor's
//	ill-sleep N      after so many milliseconds
//
// FUNCTION is C_Encrypt or another that a module has in its list, or * for all. The
// first rule of a function that is not used up counts: it is not for skip calls and
// then for count ones, all without a count. Such a call waits for sleep_ms, and then
// is made; or answers rv, decimal or hexadecimal after 0x, without being made; or ends
// the process by a write to nowhere, an abort or _exit(N); or never comes back.
//
// STYLE is written (the token writes its own over the caller's), appended-12,
// appended-16 or prepended-12 (it has its own with the result), fixed (always the
// same one), stuck (always the same one, which it writes over the caller's) or
// short-tag (the caller's, but a tag of 96 bits).
func (f *Fault) Set(rules ...string) {
	f.t.Helper()
	if err := checkRules(rules); err != nil {
		f.t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	next := f.file("rules.next")
	if err := os.WriteFile(next, []byte(strings.Join(rules, "\n")+"\n"), 0o600); err != nil {
		f.t.Fatal(err)
	}
	// The module knows them by their time. That of the clock may be the same twice.
	f.sets++
	if err := os.Chtimes(next, time.Time{}, time.Unix(f.sets, 0)); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(next, f.file("rules")); err != nil {
		f.t.Fatal(err)
	}
}

// Calls returns how often each function was called since it was last asked, in all
// processes; functions that were not are not in it. A call counts when it begins.
func (f *Fault) Calls() map[string]int {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	content, err := io.ReadAll(f.calls)
	if err != nil {
		f.t.Fatal(err)
	}
	content = append(f.rest, content...)
	complete := bytes.LastIndexByte(content, '\n') + 1
	f.rest = content[complete:]
	n := map[string]int{}
	for line := range bytes.Lines(content[:complete]) {
		n[string(bytes.TrimSpace(line))]++
	}
	return n
}
