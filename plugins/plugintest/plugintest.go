// Package plugintest proves that a backend keeps the contract of package
// plugins.
package plugintest

import (
	"bytes"
	"context"
	"crypto/rand"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/plugins"
)

// callTimeout bounds each call of the suite.
const callTimeout = 20 * time.Second

// Instance is an opened backend with the keys that the tests use. Both have an
// enabled version.
type Instance struct {
	Backend plugins.Backend
	Key     plugins.KeyRef
	// Other is another wrapping key, not another version of Key.
	Other plugins.KeyRef
	// Missing is the URI of no key.
	Missing string
	// Disable makes Key's version unusable. Optional.
	Disable func(t *testing.T)
	// Ail makes Key an outage of this key alone. Optional.
	Ail func(t *testing.T)
	// Random: the backend has plugins.CapabilityRandom.
	Random bool
}

// Run tests the backend that open returns; each subtest opens its own, and
// open arranges with t.Cleanup for its end.
func Run(t *testing.T, open func(t *testing.T) Instance) {
	t.Helper()
	for _, c := range []struct {
		name string
		run  func(*testing.T, Instance)
	}{
		{"RoundTrip", testRoundTrip},
		{"Sizes", testSizes},
		{"BindingIsEnforced", testBinding},
		{"OtherKey", testOtherKey},
		{"OtherVersion", testOtherVersion},
		{"DamagedCiphertext", testDamage},
		{"UnknownKey", testUnknownKey},
		{"DisabledVersion", testDisabled},
		{"IllKey", testIllKey},
		{"Describe", testDescribe},
		{"Check", testCheck},
		{"CiphertextsDiffer", testCiphertextsDiffer},
		{"InputsAreNotChanged", testInputs},
		{"Random", testRandom},
		{"Concurrency", testConcurrency},
		{"CancelledContext", testCancelled},
		{"CloseTwice", testClose},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, open(t)) })
	}
}

// binding returns a binding with everything in it.
func binding() plugins.Binding {
	return plugins.Binding{
		Purpose: "exported", ProviderInfo: []byte{1, 0, 255, 7}, ContextBound: true,
		Context: map[string]string{"tenant": "7", "região": "são paulo", "empty": ""},
	}
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	t.Cleanup(cancel)
	return ctx
}

func random(t *testing.T, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func wrap(t *testing.T, i Instance, plaintext []byte, b plugins.Binding) []byte {
	t.Helper()
	ciphertext, err := i.Backend.Wrap(bounded(t), i.Key, plaintext, b)
	if err != nil {
		t.Fatalf("Wrap of %d bytes: %v", len(plaintext), err)
	}
	if n := len(ciphertext); n == 0 || n > plugins.MaxCiphertextSize {
		t.Fatalf("Wrap of %d bytes: got %d bytes, want 1 to %d", len(plaintext), n, plugins.MaxCiphertextSize)
	}
	return ciphertext
}

// wantUnwrap and wantNot are what every test asks in the end.
func wantUnwrap(t *testing.T, i Instance, ciphertext []byte, b plugins.Binding, want []byte) {
	t.Helper()
	got, err := i.Backend.Unwrap(bounded(t), i.Key, ciphertext, b)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("Unwrap: got %d bytes and error %v, want the %d bytes that were wrapped", len(got), err, len(want))
	}
}

func wantNot(t *testing.T, what string, i Instance, key plugins.KeyRef, ciphertext []byte, b plugins.Binding, want plugins.Class) {
	t.Helper()
	got, err := i.Backend.Unwrap(bounded(t), key, ciphertext, b)
	if class := plugins.ClassOf(err); class != want || got != nil {
		t.Errorf("Unwrap with %s: got %d bytes and %s (%v), want nothing and %s", what, len(got), class, err, want)
	}
}

func testRoundTrip(t *testing.T, i Instance) {
	for _, size := range []int{1, 2, 16, 31, 32, 33, 64, 4095, plugins.MaxMaterialSize} {
		plaintext := random(t, size)
		wantUnwrap(t, i, wrap(t, i, plaintext, binding()), binding(), plaintext)
	}
	zeros := make([]byte, 32)
	wantUnwrap(t, i, wrap(t, i, zeros, plugins.Binding{}), plugins.Binding{}, zeros)
}

func testSizes(t *testing.T, i Instance) {
	for _, size := range []int{0, plugins.MaxMaterialSize + 1} {
		got, err := i.Backend.Wrap(bounded(t), i.Key, make([]byte, size), binding())
		if class := plugins.ClassOf(err); class != plugins.Invalid || got != nil {
			t.Errorf("Wrap of %d bytes: got %d bytes and %s (%v), want nothing and Invalid", size, len(got), class, err)
		}
	}
}

// bindings returns bindings that all differ from binding() and each other.
func bindings() map[string]plugins.Binding {
	change := func(apply func(*plugins.Binding)) plugins.Binding {
		b := binding()
		apply(&b)
		return b
	}
	return map[string]plugins.Binding{
		"another purpose":                change(func(b *plugins.Binding) { b.Purpose = "wrap" }),
		"no purpose":                     change(func(b *plugins.Binding) { b.Purpose = "" }),
		"other provider information":     change(func(b *plugins.Binding) { b.ProviderInfo[1] ^= 1 }),
		"no provider information":        change(func(b *plugins.Binding) { b.ProviderInfo = nil }),
		"longer provider information":    change(func(b *plugins.Binding) { b.ProviderInfo = append(b.ProviderInfo, 0) }),
		"the context not bound":          change(func(b *plugins.Binding) { b.ContextBound, b.Context = false, nil }),
		"an empty context":               change(func(b *plugins.Binding) { b.Context = nil }),
		"another value":                  change(func(b *plugins.Binding) { b.Context["tenant"] = "8" }),
		"another key":                    change(func(b *plugins.Binding) { delete(b.Context, "tenant"); b.Context["tenanu"] = "7" }),
		"a pair less":                    change(func(b *plugins.Binding) { delete(b.Context, "empty") }),
		"a pair more":                    change(func(b *plugins.Binding) { b.Context["more"] = "" }),
		"a byte moved from key to value": change(func(b *plugins.Binding) { delete(b.Context, "tenant"); b.Context["tenan"] = "t7" }),
	}
}

func testBinding(t *testing.T, i Instance) {
	plaintext := random(t, 32)
	ciphertext := wrap(t, i, plaintext, binding())
	all := bindings()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		wantNot(t, name, i, i.Key, ciphertext, all[name], plugins.BadCiphertext)
		// And the other way round: none of them opens with the full binding.
		wantNot(t, "the full binding what was wrapped with "+name, i, i.Key, wrap(t, i, plaintext, all[name]), binding(), plugins.BadCiphertext)
	}
	wantUnwrap(t, i, ciphertext, binding(), plaintext)
	unbound := binding()
	unbound.ContextBound = false
	ignored := unbound
	ignored.Context = nil
	wantUnwrap(t, i, wrap(t, i, plaintext, unbound), ignored, plaintext)
}

func testOtherKey(t *testing.T, i Instance) {
	wantNot(t, "another key", i, i.Other, wrap(t, i, random(t, 32), binding()), binding(), plugins.BadCiphertext)
}

func testOtherVersion(t *testing.T, i Instance) {
	ciphertext := wrap(t, i, random(t, 32), binding())
	d, err := i.Backend.Describe(bounded(t), i.Key.URI)
	if err != nil {
		t.Fatalf("Describe: %v", err)
	}
	for _, v := range d.Versions {
		if v.Version == i.Key.Version || v.State != plugins.Enabled {
			continue
		}
		wantNot(t, "version "+v.Version, i, plugins.KeyRef{URI: i.Key.URI, Version: v.Version}, ciphertext, binding(), plugins.BadCiphertext)
	}
	missing := plugins.KeyRef{URI: i.Key.URI, Version: "999999999"}
	wantNot(t, "a version that does not exist", i, missing, ciphertext, binding(), plugins.KeyNotFound)
	if _, err := i.Backend.Wrap(bounded(t), missing, random(t, 32), binding()); plugins.ClassOf(err) != plugins.KeyNotFound {
		t.Errorf("Wrap under a version that does not exist: got %v, want KeyNotFound", err)
	}
}

func testDamage(t *testing.T, i Instance) {
	plaintext := random(t, 32)
	ciphertext := wrap(t, i, plaintext, binding())
	for n := range ciphertext {
		damaged := bytes.Clone(ciphertext)
		damaged[n] ^= 1 << (n % 8)
		wantNot(t, "a flipped bit", i, i.Key, damaged, binding(), plugins.BadCiphertext)
	}
	for name, damaged := range map[string][]byte{
		"no ciphertext":           nil,
		"an empty ciphertext":     {},
		"one byte":                ciphertext[:1],
		"half a ciphertext":       ciphertext[:len(ciphertext)/2],
		"the last byte missing":   ciphertext[:len(ciphertext)-1],
		"the first byte missing":  ciphertext[1:],
		"a byte more":             append(bytes.Clone(ciphertext), 0),
		"the ciphertext twice":    slices.Concat(ciphertext, ciphertext),
		"an oversized ciphertext": make([]byte, 64<<10),
		"zeros":                   make([]byte, len(ciphertext)),
	} {
		wantNot(t, name, i, i.Key, damaged, binding(), plugins.BadCiphertext)
	}
	wantUnwrap(t, i, ciphertext, binding(), plaintext)
}

func testUnknownKey(t *testing.T, i Instance) {
	missing := plugins.KeyRef{URI: i.Missing, Version: "1"}
	_, wrapErr := i.Backend.Wrap(bounded(t), missing, random(t, 32), binding())
	_, describeErr := i.Backend.Describe(bounded(t), i.Missing)
	for method, err := range map[string]error{"Wrap": wrapErr, "Describe": describeErr} {
		if class := plugins.ClassOf(err); class != plugins.KeyNotFound {
			t.Errorf("%s of a key that does not exist: got %s (%v), want KeyNotFound", method, class, err)
		}
	}
	wantNot(t, "a key that does not exist", i, missing, wrap(t, i, random(t, 32), binding()), binding(), plugins.KeyNotFound)
}

func testDisabled(t *testing.T, i Instance) {
	if i.Disable == nil {
		t.Log("the instance cannot disable its key")
		return
	}
	ciphertext := wrap(t, i, random(t, 32), binding())
	i.Disable(t)
	wantNot(t, "a disabled version", i, i.Key, ciphertext, binding(), plugins.KeyUnusable)
	if _, err := i.Backend.Wrap(bounded(t), i.Key, random(t, 32), binding()); plugins.ClassOf(err) != plugins.KeyUnusable {
		t.Errorf("Wrap under a disabled version: got %v, want KeyUnusable", err)
	}
	d, err := i.Backend.Describe(bounded(t), i.Key.URI)
	if err != nil {
		t.Fatalf("Describe: %v", err)
	}
	for _, v := range d.Versions {
		if v.Version == i.Key.Version && v.State == plugins.Enabled {
			t.Errorf("Describe: version %s is still enabled after it was disabled", v.Version)
		}
	}
}

// An outage of one key is told as that: the breaker would keep all others from a backend
// that serves them.
func testIllKey(t *testing.T, i Instance) {
	if i.Ail == nil {
		t.Log("the instance cannot let its key ail")
		return
	}
	plaintext, healthy := random(t, 32), i
	ciphertext := wrap(t, i, plaintext, binding())
	healthy.Key = i.Other
	beside := wrap(t, healthy, plaintext, binding())
	i.Ail(t)
	_, wrapErr := i.Backend.Wrap(bounded(t), i.Key, plaintext, binding())
	_, unwrapErr := i.Backend.Unwrap(bounded(t), i.Key, ciphertext, binding())
	for method, err := range map[string]error{"Wrap": wrapErr, "Unwrap": unwrapErr} {
		if !plugins.IsKeyOnly(err) {
			t.Errorf("%s with an ill key: got %v, want Unavailable with KeyOnly", method, err)
		}
	}
	wantUnwrap(t, healthy, beside, binding(), plaintext)
	testCheck(t, i)
}

func testDescribe(t *testing.T, i Instance) {
	for _, key := range []plugins.KeyRef{i.Key, i.Other} {
		first, err := i.Backend.Describe(bounded(t), key.URI)
		if err != nil {
			t.Fatalf("Describe(%q): %v", key.URI, err)
		}
		seen := map[string]plugins.KeyState{}
		for _, v := range first.Versions {
			if seen[v.Version] != 0 || v.Version == "" || v.State < plugins.Enabled || v.State > plugins.Destroyed {
				t.Errorf("Describe(%q): version %q with state %d is nameless, twice there or in no state", key.URI, v.Version, v.State)
			}
			seen[v.Version] = v.State
		}
		if seen[first.Current] == 0 {
			t.Errorf("Describe(%q): the current version %q is not among the versions %v", key.URI, first.Current, seen)
		}
		if seen[key.Version] != plugins.Enabled {
			t.Errorf("Describe(%q): version %q is %s, want enabled", key.URI, key.Version, seen[key.Version])
		}
		second, err := i.Backend.Describe(bounded(t), key.URI)
		if diff := cmp.Diff(first, second); err != nil || diff != "" {
			t.Errorf("Describe(%q) twice: %v (-first +second)\n%s", key.URI, err, diff)
		}
	}
}

func testCheck(t *testing.T, i Instance) {
	for range 3 {
		h, err := i.Backend.Check(bounded(t))
		if err != nil || h.UpstreamLatency < 0 {
			t.Fatalf("Check: got %+v and %v, want a healthy backend", h, err)
		}
	}
}

func testCiphertextsDiffer(t *testing.T, i Instance) {
	plaintext := random(t, 32)
	first, second := wrap(t, i, plaintext, binding()), wrap(t, i, plaintext, binding())
	if bytes.Equal(first, second) {
		t.Error("two ciphertexts of the same key material are equal: they tell that the material is")
	}
	if bytes.Contains(first, plaintext) {
		t.Error("the ciphertext holds the key material in clear")
	}
}

func testInputs(t *testing.T, i Instance) {
	plaintext, b := random(t, 32), binding()
	before := bytes.Clone(plaintext)
	ciphertext := wrap(t, i, plaintext, b)
	if !bytes.Equal(plaintext, before) {
		t.Error("Wrap changed the key material it was given")
	}
	kept := bytes.Clone(ciphertext)
	got, err := i.Backend.Unwrap(bounded(t), i.Key, ciphertext, b)
	if err != nil {
		t.Fatalf("Unwrap: %v", err)
	}
	if !bytes.Equal(ciphertext, kept) {
		t.Error("Unwrap changed the ciphertext it was given")
	}
	if diff := cmp.Diff(binding(), b); diff != "" {
		t.Errorf("the binding was changed (-before +after)\n%s", diff)
	}
	clear(got) // the caller owns it
	clear(plaintext)
	wantUnwrap(t, i, ciphertext, b, before)
}

func testConcurrency(t *testing.T, i Instance) {
	const workers, rounds = 8, 12
	shared := random(t, 32)
	ciphertext := wrap(t, i, shared, binding())
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range rounds {
				own := make([]byte, 32)
				_, _ = rand.Read(own)
				wrapped, err := i.Backend.Wrap(bounded(t), i.Key, own, binding())
				if err != nil {
					t.Errorf("Wrap: %v", err)
					return
				}
				for _, c := range []struct{ ciphertext, want []byte }{{wrapped, own}, {ciphertext, shared}} {
					if got, err := i.Backend.Unwrap(bounded(t), i.Key, c.ciphertext, binding()); err != nil || !bytes.Equal(got, c.want) {
						t.Errorf("Unwrap: wrong key material or error %v", err)
						return
					}
				}
				if _, err := i.Backend.Describe(bounded(t), i.Key.URI); err != nil {
					t.Errorf("Describe: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

func testCancelled(t *testing.T, i Instance) {
	ciphertext := wrap(t, i, random(t, 32), binding())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, wrapErr := i.Backend.Wrap(ctx, i.Key, random(t, 32), binding())
	_, unwrapErr := i.Backend.Unwrap(ctx, i.Key, ciphertext, binding())
	_, describeErr := i.Backend.Describe(ctx, i.Key.URI)
	errs := map[string]error{"Wrap": wrapErr, "Unwrap": unwrapErr, "Describe": describeErr}
	if source, ok := i.Backend.(plugins.RandomSource); ok && i.Random {
		errs["Random"] = source.Random(ctx, make([]byte, 32))
	}
	for method, err := range errs {
		// A backend that needs no time may answer; it must not say anything else.
		if class := plugins.ClassOf(err); err != nil && class != plugins.Unavailable {
			t.Errorf("%s with a cancelled context: got %s (%v), want success or Unavailable", method, class, err)
		}
	}
	if _, err := i.Backend.Describe(bounded(t), i.Key.URI); err != nil {
		t.Errorf("Describe after cancelled calls: %v", err)
	}
}

func testClose(t *testing.T, i Instance) {
	for range 2 {
		if err := i.Backend.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
}
