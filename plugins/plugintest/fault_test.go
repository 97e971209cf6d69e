package plugintest_test

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// faultVariable names the fault that TestFault shows, in a process of its own.
const faultVariable = "KMS_AGENT_PLUGINTEST_FAULT"

// faulty breaks the contract in one place.
type faulty struct {
	plugintest.Memory

	bind    func(plugins.Binding) plugins.Binding
	key     func(plugins.KeyRef) plugins.KeyRef
	wrap    func(plaintext, ciphertext []byte) []byte
	random  func(dst []byte)
	err     func(error) error
	state   plugins.KeyState
	current string
}

func (f *faulty) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	ciphertext, err := f.Memory.Wrap(ctx, f.key(key), plaintext, f.bind(b))
	if err != nil {
		return nil, f.err(err)
	}
	return f.wrap(plaintext, ciphertext), nil
}

func (f *faulty) Unwrap(ctx context.Context, key plugins.KeyRef, ciphertext []byte, b plugins.Binding) ([]byte, error) {
	plaintext, err := f.Memory.Unwrap(ctx, f.key(key), ciphertext, f.bind(b))
	return plaintext, f.err(err)
}

func (f *faulty) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	d, err := f.Memory.Describe(ctx, uri)
	if f.current != "" {
		d.Current = f.current
	}
	if f.state != 0 {
		for i := range d.Versions {
			d.Versions[i].State = f.state
		}
	}
	return d, f.err(err)
}

func (f *faulty) Random(ctx context.Context, dst []byte) error {
	err := f.Memory.Random(ctx, dst)
	if err == nil {
		f.random(dst)
	}
	return f.err(err)
}

// faults are the faults with the test of the suite that finds each.
func faults() map[string]struct {
	test string
	make func(*faulty)
} {
	type fault = struct {
		test string
		make func(*faulty)
	}
	class := func(class, instead plugins.Class) func(*faulty) {
		return func(f *faulty) {
			f.err = func(err error) error {
				if plugins.ClassOf(err) == class {
					return plugins.Errorf(instead, "another class")
				}
				return err
			}
		}
	}
	bind := func(change func(*plugins.Binding)) func(*faulty) {
		return func(f *faulty) { f.bind = func(b plugins.Binding) plugins.Binding { change(&b); return b } }
	}
	return map[string]fault{
		"none":           {"", func(*faulty) {}},
		"no binding":     {"BindingIsEnforced", bind(func(b *plugins.Binding) { *b = plugins.Binding{} })},
		"no purpose":     {"BindingIsEnforced", bind(func(b *plugins.Binding) { b.Purpose = "" })},
		"no information": {"BindingIsEnforced", bind(func(b *plugins.Binding) { b.ProviderInfo = nil })},
		"empty is none":  {"BindingIsEnforced", bind(func(b *plugins.Binding) { b.ContextBound = len(b.Context) > 0 })},
		"always bound":   {"BindingIsEnforced", bind(func(b *plugins.Binding) { b.ContextBound = true })},
		"one key for all": {"OtherKey", func(f *faulty) {
			f.key = func(plugins.KeyRef) plugins.KeyRef { return plugins.KeyRef{URI: "memory:orders", Version: "2"} }
		}},
		"any version":          {"OtherVersion", func(f *faulty) { f.key = func(k plugins.KeyRef) plugins.KeyRef { k.Version = "1"; return k } }},
		"changes its input":    {"InputsAreNotChanged", func(f *faulty) { f.wrap = func(p, c []byte) []byte { clear(p); return c } }},
		"tells the material":   {"CiphertextsDiffer", func(f *faulty) { f.wrap = func(p, c []byte) []byte { return slices.Concat(c, p) } }},
		"a revocation instead": {"DamagedCiphertext", class(plugins.BadCiphertext, plugins.KeyUnusable)},
		"an outage instead":    {"UnknownKey", class(plugins.KeyNotFound, plugins.Unavailable)},
		"disabled is missing":  {"DisabledVersion", class(plugins.KeyUnusable, plugins.KeyNotFound)},
		"internal sizes":       {"Sizes", class(plugins.Invalid, plugins.Internal)},
		"internal lengths":     {"Random", class(plugins.Invalid, plugins.Internal)},
		"no random at all":     {"Random", func(f *faulty) { f.random = func(dst []byte) { clear(dst) } }},
		"the same random":      {"Random", func(f *faulty) { f.random = func(dst []byte) { copy(dst, bytes.Repeat([]byte{7}, len(dst))) } }},
		"half of it":           {"Random", func(f *faulty) { f.random = func(dst []byte) { clear(dst[len(dst)/2:]) } }},
		"too much of it":       {"Random", func(f *faulty) { f.random = func(dst []byte) { clear(dst[len(dst):cap(dst)]) } }},
		"always enabled":       {"DisabledVersion", func(f *faulty) { f.state = plugins.Enabled }},
		"an unknown state":     {"Describe", func(f *faulty) { f.state = 9 }},
		"an unlisted version":  {"Describe", func(f *faulty) { f.current = "99" }},
		"an outage of all":     {"IllKey", class(plugins.Unavailable, plugins.Unavailable)},
		"cancelled is a no":    {"CancelledContext", class(plugins.Unavailable, plugins.Denied)},
	}
}

// TestFault runs the suite over a faulty backend, for TestSuiteFindsFaults; it
// has nothing to do otherwise.
func TestFault(t *testing.T) {
	fault, ok := faults()[os.Getenv(faultVariable)]
	if !ok {
		return
	}
	plugintest.Run(t, func(t *testing.T) plugintest.Instance {
		settings, s := memorySettings(t)
		f := &faulty{
			bind: func(b plugins.Binding) plugins.Binding { return b }, key: func(k plugins.KeyRef) plugins.KeyRef { return k },
			wrap: func(_, c []byte) []byte { return c }, random: func([]byte) {}, err: func(err error) error { return err },
		}
		fault.make(f)
		if _, err := f.Open(t.Context(), settings); err != nil {
			t.Fatal(err)
		}
		return instance(f, s)
	})
}

func TestSuiteFindsFaults(t *testing.T) {
	all := faults()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestFault$", "-test.v")
		cmd.Env = append(os.Environ(), faultVariable+"="+name)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		failed := errors.As(err, &exit)
		want := all[name].test
		if failed != (want != "") || failed && !bytes.Contains(out, []byte("--- FAIL: TestFault/"+want)) {
			t.Errorf("fault %q: got %v, want a failure of %q\n%s", name, err, want, lines(out, "--- FAIL"))
		}
	}
}

func lines(out []byte, with string) string {
	var found strings.Builder
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, with) {
			found.WriteString(line)
		}
	}
	return found.String()
}
