package envelope_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/envelope"
)

// frozenInfo is the encoding of testInfo, spelled out in docs/format.md.
const frozenInfo = "010100404142434445464748494a4b4c4d4e4f00066f726465727300147661756c743a7472616e7369742f6f7264657273000133"

func TestProviderInfoVector(t *testing.T) {
	b, err := testInfo().Marshal()
	if err != nil || hex.EncodeToString(b) != frozenInfo {
		t.Errorf("Marshal gave %x, %v; want the frozen %s", b, err, frozenInfo)
	}
	got, err := envelope.ParseProviderInfo(unhex(t, frozenInfo))
	if diff := cmp.Diff(testInfo(), got); err != nil || diff != "" {
		t.Errorf("ParseProviderInfo: %v (-want +got):\n%s", err, diff)
	}
}

// frozenCheck is the key check of the data key 00 01 ... 1f, and frozenCheckedInfo the
// encoding of checkedInfo, both spelled out in docs/format.md.
const (
	frozenCheck       = "b84ccbbf26e2d629eaf4ec120932e007"
	frozenCheckedInfo = "020201404142434445464748494a4b4c4d4e4fb84ccbbf26e2d629eaf4ec120932e00700066f726465727300147661756c743a7472616e7369742f6f7264657273000133"
)

func checkedInfo(t testing.TB) envelope.ProviderInfo {
	t.Helper()
	p := testInfo()
	p.Purpose, p.ContextBound, p.Check = envelope.PurposeExported, true, envelope.KeyCheck(unhex(t, frozenCheck))
	return p
}

func TestKeyCheckVector(t *testing.T) {
	c, err := envelope.NewKeyCheck(count(0, envelope.DataKeySize))
	if err != nil || hex.EncodeToString(c[:]) != frozenCheck {
		t.Errorf("the check is %x, %v; want the frozen %s", c, err, frozenCheck)
	}
	b, err := checkedInfo(t).Marshal()
	if err != nil || hex.EncodeToString(b) != frozenCheckedInfo {
		t.Errorf("Marshal gave %x, %v; want the frozen %s", b, err, frozenCheckedInfo)
	}
	got, err := envelope.ParseProviderInfo(unhex(t, frozenCheckedInfo))
	if diff := cmp.Diff(checkedInfo(t), got); err != nil || diff != "" {
		t.Errorf("ParseProviderInfo: %v (-want +got):\n%s", err, diff)
	}
}

func TestKeyCheck(t *testing.T) {
	key := count(7, envelope.DataKeySize)
	c, err := envelope.NewKeyCheck(key)
	if err != nil || !c.Holds(key) {
		t.Errorf("the check of the key itself: %v", err)
	}
	for i := range key {
		other := bytes.Clone(key)
		if other[i] ^= 1; c.Holds(other) {
			t.Errorf("it holds for another key, changed in byte %d", i)
		}
	}
	for _, size := range []int{0, 16, 31, 33} {
		if c.Holds(make([]byte, size)) {
			t.Errorf("it holds for %d bytes", size)
		}
		if _, err := envelope.NewKeyCheck(make([]byte, size)); err == nil {
			t.Errorf("%d bytes have a check", size)
		}
	}
	if (envelope.KeyCheck{}) == c || !(envelope.KeyCheck{}).Holds([]byte("anything")) {
		t.Error("without a check nothing is checked")
	}
}

func TestProviderInfoRoundTrip(t *testing.T) {
	for _, purpose := range []envelope.Purpose{envelope.PurposeMessage, envelope.PurposeExported, envelope.PurposeWrap, envelope.PurposeProbe} {
		want := testInfo()
		want.Purpose, want.ContextBound, want.Key = purpose, true, "größe/µ"
		b, err := want.Marshal()
		if err != nil {
			t.Fatalf("%v: %v", purpose, err)
		}
		got, err := envelope.ParseProviderInfo(b)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%v: %v (-want +got):\n%s", purpose, err, diff)
		}
	}
}

func TestPurposeString(t *testing.T) {
	var got []string
	for p := range envelope.Purpose(6) {
		got = append(got, p.String())
	}
	want := []string{"purpose 0", "message", "exported", "wrap", "probe", "purpose 5"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestProviderInfoRefusals(t *testing.T) {
	for name, change := range map[string]func(*envelope.ProviderInfo){
		"no purpose":        func(p *envelope.ProviderInfo) { p.Purpose = 0 },
		"unknown purpose":   func(p *envelope.ProviderInfo) { p.Purpose = 5 },
		"exported, unbound": func(p *envelope.ProviderInfo) { p.Purpose = envelope.PurposeExported },
		"wrap, unbound":     func(p *envelope.ProviderInfo) { p.Purpose = envelope.PurposeWrap },
		"wrap, checked": func(p *envelope.ProviderInfo) {
			p.Purpose, p.ContextBound, p.Check = envelope.PurposeWrap, true, envelope.KeyCheck{1}
		},
		"no key":              func(p *envelope.ProviderInfo) { p.Key = "" },
		"no URI":              func(p *envelope.ProviderInfo) { p.URI = "" },
		"no version":          func(p *envelope.ProviderInfo) { p.Version = "" },
		"long key":            func(p *envelope.ProviderInfo) { p.Key = strings.Repeat("k", envelope.MaxKeyNameSize+1) },
		"long URI":            func(p *envelope.ProviderInfo) { p.URI = strings.Repeat("u", envelope.MaxURISize+1) },
		"long version":        func(p *envelope.ProviderInfo) { p.Version = strings.Repeat("v", envelope.MaxKeyVersionSize+1) },
		"key not UTF-8":       func(p *envelope.ProviderInfo) { p.Key = "\xff" },
		"newline in a URI":    func(p *envelope.ProviderInfo) { p.URI = "local:a\nb" },
		"NUL in a version":    func(p *envelope.ProviderInfo) { p.Version = "1\x00" },
		"C1 control in a key": func(p *envelope.ProviderInfo) { p.Key = "a\u0085b" },
	} {
		p := testInfo()
		change(&p)
		if b, err := p.Marshal(); err == nil {
			t.Errorf("%s: Marshal gave %x, want an error", name, b)
		}
	}
}

func TestParseProviderInfoRefusals(t *testing.T) {
	good, checked := unhex(t, frozenInfo), unhex(t, frozenCheckedInfo)
	for _, info := range [][]byte{good, checked} {
		for n := range info {
			if _, err := envelope.ParseProviderInfo(info[:n]); !errors.Is(err, envelope.ErrMalformed) {
				t.Errorf("first %d bytes of %d: %v, want ErrMalformed", n, len(info), err)
			}
		}
	}
	unset := bytes.Clone(checked)
	clear(unset[19 : 19+envelope.KeyCheckSize])
	guessable := bytes.Clone(checked)
	guessable[1] = byte(envelope.PurposeWrap)
	change := func(at int, b byte) []byte {
		c := bytes.Clone(good)
		c[at] = b
		return c
	}
	for name, tt := range map[string]struct {
		b    []byte
		want error
	}{
		"version 0":        {change(0, 0), envelope.ErrMalformed},
		"version 3":        {change(0, 3), envelope.ErrMalformed},
		"a check of zeros": {unset, envelope.ErrMalformed},
		"wrap, checked":    {guessable, envelope.ErrMalformed},
		"purpose 0":        {change(1, 0), envelope.ErrMalformed},
		"purpose 5":        {change(1, 5), envelope.ErrMalformed},
		"wrap, unbound":    {change(1, 3), envelope.ErrMalformed},
		"binding mode 2":   {change(2, 2), envelope.ErrMalformed},
		"control in a key": {change(21, 0x0A), envelope.ErrMalformed},
		"key not UTF-8":    {change(21, 0xFF), envelope.ErrMalformed},
		"long key":         {change(19, 0x01), envelope.ErrLimit},
		"trailing byte":    {append(bytes.Clone(good), 0), envelope.ErrMalformed},
	} {
		if _, err := envelope.ParseProviderInfo(tt.b); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}
