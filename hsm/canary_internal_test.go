package hsm

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// soft is a Token of SoftHSM whose catalogue is in a file.
func soft(t *testing.T) *Token {
	t.Helper()
	s := hsmtest.NewSoftHSM(t)
	token, err := Open(Config{
		Module: hsmtest.SoftHSMModule, Token: URI{Token: hsmtest.Label},
		Login:     &Ledger{Path: s.Path("logins"), PIN: PINSource{File: s.PINFile()}},
		Catalogue: &CatalogueFile{Path: s.Path("catalogue"), KeyFile: s.Path("catalogue.key")},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return token
}

// keyOf makes a key.
func keyOf(t *testing.T, token *Token, name string) *Version {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	k, err := token.CreateKey(ctx, name, GCM)
	if err != nil {
		t.Fatal(err)
	}
	return k.Versions[0]
}

// A token may put another key behind a handle: the next canary finds it out, also where
// calls follow each other without a pause, and the key is looked for.
func TestAnotherKeyBehindTheHandle(t *testing.T) {
	token := soft(t)
	v, other := keyOf(t, token, "orders"), keyOf(t, token, "other")
	m := bytes.Repeat([]byte{7}, 32)
	for _, version := range []*Version{v, other} {
		if _, err := token.Wrap(t.Context(), version, nil, m, nil); err != nil {
			t.Fatal(err)
		}
	}
	b := *v.handles.Load()
	b.keys = other.handles.Load().keys
	v.handles.Store(&b)
	if _, err := token.Wrap(t.Context(), v, nil, m, nil); err != nil {
		t.Fatalf("within the time that a canary speaks for: %v", err)
	}
	b.opened -= int64(provenFor)
	v.handles.Store(&b)
	if _, err := token.Wrap(t.Context(), v, nil, m, nil); err != nil || v.handles.Load().keys == b.keys {
		t.Errorf("Wrap: %v, want that the key of this version is found, which is there still", err)
	}
}

// Handles do not outlive the login in which they were found; where it is there still they
// are good.
func TestHandlesAfterALogin(t *testing.T) {
	token := soft(t)
	v := keyOf(t, token, "orders")
	if _, err := token.Wrap(t.Context(), v, nil, []byte{1}, nil); err != nil {
		t.Fatal(err)
	}
	a, err := token.attached(t.Context())
	if err != nil || v.bound(a, false) == nil {
		t.Fatalf("the key is not bound, %v", err)
	}
	library := pkcs11.New(hsmtest.SoftHSMModule)
	defer library.Destroy()
	for _, lost := range []bool{false, true} {
		if lost {
			hsmtest.LogOut(t, library, a.slot)
		}
		if err := token.relogin(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		if bound := v.bound(a, false) != nil; bound == lost {
			t.Errorf("the login was lost: %v; the key is bound after it: %v", lost, bound)
		}
	}
}

// What the catalogue says of a version is what its canary was wrapped under: suite,
// number, ID, second key and key's name.
func TestCanaryCoversTheRecord(t *testing.T) {
	token := soft(t)
	v := keyOf(t, token, "orders")
	other := keyOf(t, token, "other")
	for name, change := range map[string]func(v *Version){
		"number":     func(v *Version) { v.Number = 2 },
		"name":       func(v *Version) { v.Key = "letters" },
		"suite":      func(v *Version) { v.Suite, v.style = KWP, 0 },
		"second key": func(v *Version) { v.macID = ID{1} },
		"ID":         func(v *Version) { v.ID = other.ID },
		"style":      func(v *Version) { v.style = IVAppended16 },
		"canary":     func(v *Version) { v.canary = other.canary },
		"sum":        func(v *Version) { v.canarySum[0] ^= 1 },
		"all of another key": func(v *Version) {
			v.ID, v.canary, v.canarySum = other.ID, other.canary, other.canarySum
		},
	} {
		changed := v.with(Enabled)
		change(changed)
		if _, err := token.Wrap(t.Context(), changed, nil, []byte{1}, nil); err == nil || KindOf(err) == Unavailable {
			t.Errorf("another %s: %v, want that it is not used", name, err)
		}
	}
	if _, err := token.Wrap(t.Context(), v, nil, []byte{1}, nil); err != nil {
		t.Error(err)
	}
}

// Who comes while somebody else looks again at a key that was idle for long waits for what
// that finds: an old word is none, neither that it is the right key nor that it may not wrap.
func TestIdleKeysAreLookedAtAgain(t *testing.T) {
	token := soft(t)
	v, other := keyOf(t, token, "orders"), keyOf(t, token, "other")
	m := bytes.Repeat([]byte{7}, 32)
	for name, c := range map[string]struct {
		change func(b *binding)
		want   error
	}{
		"another key":        {func(b *binding) { b.keys = other.handles.Load().keys }, errOpen},
		"refused a day ago":  {func(b *binding) { b.unfit, b.tested = refusal(cryptoki.Error(0x68)), b.opened }, nil},
		"nothing is changed": {func(*binding) {}, nil},
	} {
		for _, version := range []*Version{v, other} {
			if _, err := token.Wrap(t.Context(), version, nil, m, nil); err != nil {
				t.Fatal(err)
			}
		}
		b := *v.handles.Load()
		b.opened -= int64(24 * time.Hour)
		c.change(&b)
		v.handles.Store(&b)
		errs := make(chan error, 16)
		for range cap(errs) {
			go func() {
				wrapped, err := token.Wrap(t.Context(), v, nil, m, nil)
				if err == nil { // under the right key then
					_, err = token.Unwrap(t.Context(), v, nil, wrapped, nil)
				}
				errs <- err
			}()
		}
		for range cap(errs) {
			if err := <-errs; err != nil && (c.want == nil || KindOf(err) != KeyUnusable) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// While somebody opens the canary others go on with what it said before, twice as long as
// it speaks for itself at most.
func TestOldCanary(t *testing.T) {
	token := soft(t)
	v := keyOf(t, token, "orders")
	wrap := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := token.Wrap(ctx, v, nil, []byte{1}, nil)
		return err
	}
	if _, err := token.Wrap(t.Context(), v, nil, []byte{1}, nil); err != nil {
		t.Fatal(err)
	}
	fresh := *v.handles.Load()
	never := make(chan struct{})
	v.look.Store(&look{a: fresh.a, epoch: fresh.epoch, wrap: true, opens: never, told: never, ended: never}) // of somebody who waits for a slow token
	for age, waits := range map[time.Duration]bool{provenFor + time.Second: false, 2 * provenFor: true} {
		b := fresh
		b.opened -= int64(age)
		v.handles.Store(&b)
		if err := wrap(); isCallers(err) != waits || err != nil && !waits {
			t.Errorf("%v after its canary: %v, want that it waits: %v", age, err, waits)
		}
	}
}
