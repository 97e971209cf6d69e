package plugins_test

import (
	"bytes"
	"encoding/hex"
	"reflect"
	"testing"

	"pgregory.net/rapid"

	"github.com/kms-agent/kms-agent/plugins"
)

// Frozen: wrapping keys have authenticated these bytes.
func TestBindingAADVectors(t *testing.T) {
	for name, c := range map[string]struct {
		binding plugins.Binding
		want    string
	}{
		"nothing": {
			plugins.Binding{},
			"000000000000000b6b6d732d6167656e742f31" + "0000000000000000" + "0000000000000000" + "000000000000000100",
		},
		"empty context bound": {
			plugins.Binding{ContextBound: true},
			"000000000000000b6b6d732d6167656e742f31" + "0000000000000000" + "0000000000000000" + "000000000000000101" + "0000000000000000",
		},
		"all": {
			plugins.Binding{
				Purpose: "wrap", ProviderInfo: []byte{0xff, 0}, ContextBound: true,
				Context: map[string]string{"tenant": "7", "b": "", "ä": "x"},
			},
			"000000000000000b6b6d732d6167656e742f31" + "000000000000000477726170" + "0000000000000002ff00" + "000000000000000101" +
				"0000000000000003" + "000000000000000162" + "0000000000000000" + "000000000000000674656e616e74" + "000000000000000137" +
				"0000000000000002c3a4" + "000000000000000178",
		},
	} {
		if got := hex.EncodeToString(c.binding.AAD()); got != c.want {
			t.Errorf("%s: got %s, want %s", name, got, c.want)
		}
	}
}

func TestBindingAADIgnoresAContextThatIsNotBound(t *testing.T) {
	with := plugins.Binding{Purpose: "message", Context: map[string]string{"a": "b"}}
	if without := (plugins.Binding{Purpose: "message"}); !bytes.Equal(with.AAD(), without.AAD()) {
		t.Error("a context that is not bound changes the encoding")
	}
}

// Short alphabets make collisions of a faulty encoding likely.
func bindings() *rapid.Generator[plugins.Binding] {
	text := rapid.StringOfN(rapid.SampledFrom([]rune{'a', 'b', 0, 1}), 0, 4, -1)
	return rapid.Custom(func(t *rapid.T) plugins.Binding {
		b := plugins.Binding{
			Purpose: text.Draw(t, "purpose"), ProviderInfo: []byte(text.Draw(t, "info")), ContextBound: rapid.Bool().Draw(t, "bound"),
		}
		if b.ContextBound {
			b.Context = rapid.MapOfN(text, text, 0, 3).Draw(t, "context")
		}
		return b
	})
}

func TestBindingAADIsInjective(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := bindings().Draw(t, "a"), bindings().Draw(t, "b")
		if same := reflect.DeepEqual(a, b); bytes.Equal(a.AAD(), b.AAD()) != same {
			t.Fatalf("bindings %+v and %+v: equal %v, their encodings not alike", a, b, same)
		}
	})
}
