package envelope_test

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/envelope"
)

// be is a big-endian number of n bytes.
func be(n int, v uint64) []byte {
	b := make([]byte, n)
	for i := range b {
		b[n-1-i] = byte(v >> (8 * i))
	}
	return b
}

func field(s string) []byte { return append(be(2, uint64(len(s))), s...) }

// rawHeader is a header in pieces that tests replace: it is not authentic.
type rawHeader struct{ version, suite, context, edkCount, edks, content, frameLength []byte }

func goodHeader() rawHeader {
	return rawHeader{
		version: []byte{2}, suite: be(2, 0x0478), context: be(2, 0),
		edkCount: be(2, 1), edks: edkBytes("p", "i", "c"), content: []byte{2}, frameLength: be(4, 4096),
	}
}

func edkBytes(id, info, ciphertext string) []byte {
	return slices.Concat(field(id), field(info), field(ciphertext))
}

func (h rawHeader) bytes() []byte {
	return slices.Concat(h.version, h.suite, make([]byte, 32), h.context, h.edkCount, h.edks, h.content, h.frameLength, make([]byte, 32+16))
}

// contextBytes is a context of pairs as they come, behind its length.
func contextBytes(count uint64, pairs ...string) []byte {
	b := be(2, count)
	for _, s := range pairs {
		b = append(b, field(s)...)
	}
	return append(be(2, uint64(len(b))), b...)
}

var emptyFinal = slices.Concat(be(4, 0xFFFFFFFF), be(4, 1), make([]byte, 12), be(4, 0), make([]byte, 16))

func TestParseGood(t *testing.T) {
	if _, err := envelope.Parse(append(goodHeader().bytes(), emptyFinal...)); err != nil {
		t.Fatalf("Parse of the header that TestParseHeaders changes: %v", err)
	}
}

// TestParseHeaders: each deviation has its error, be it parsed or streamed.
func TestParseHeaders(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*rawHeader)
		target error
		want   string
	}{
		{"version 1", func(h *rawHeader) { h.version = []byte{1} }, envelope.ErrMalformed, "version 1"},
		{"base64", func(h *rawHeader) { h.version = []byte{'A'} }, envelope.ErrMalformed, "base64"},
		{"version 3", func(h *rawHeader) { h.version = []byte{3} }, envelope.ErrMalformed, "0x03"},
		{"suite with signature", func(h *rawHeader) { h.suite = be(2, 0x0578) }, envelope.ErrMalformed, "0578"},
		{"context of count 0", func(h *rawHeader) { h.context = contextBytes(0) }, envelope.ErrMalformed, "count"},
		{"context of 1 byte", func(h *rawHeader) { h.context = append(be(2, 1), 0) }, envelope.ErrMalformed, "count"},
		{"context shorter than count", func(h *rawHeader) { h.context = contextBytes(2, "a", "b") }, envelope.ErrMalformed, "shorter"},
		{"context longer than count", func(h *rawHeader) { h.context = contextBytes(1, "a", "b", "c", "d") }, envelope.ErrMalformed, "longer"},
		{"context unsorted", func(h *rawHeader) { h.context = contextBytes(2, "b", "", "a", "") }, envelope.ErrMalformed, "sorted"},
		{"context key twice", func(h *rawHeader) { h.context = contextBytes(2, "a", "1", "a", "2") }, envelope.ErrMalformed, "twice"},
		{"context key not UTF-8", func(h *rawHeader) { h.context = contextBytes(1, "\xff", "") }, envelope.ErrMalformed, "UTF-8"},
		{"context value not UTF-8", func(h *rawHeader) { h.context = contextBytes(1, "a", "\xc0") }, envelope.ErrMalformed, "UTF-8"},
		{"65 pairs", func(h *rawHeader) { h.context = contextBytes(65) }, envelope.ErrLimit, "65 pairs"},
		{"large context", func(h *rawHeader) { h.context = be(2, envelope.MaxContextSize+1) }, envelope.ErrLimit, "16385"},
		{"no EDK", func(h *rawHeader) { h.edkCount, h.edks = be(2, 0), nil }, envelope.ErrMalformed, "no encrypted"},
		{"17 EDKs", func(h *rawHeader) { h.edkCount = be(2, 17) }, envelope.ErrLimit, "17 encrypted"},
		{"EDK without provider", func(h *rawHeader) { h.edks = edkBytes("", "i", "c") }, envelope.ErrMalformed, "provider"},
		{"provider not UTF-8", func(h *rawHeader) { h.edks = edkBytes("\xff", "i", "c") }, envelope.ErrMalformed, "provider"},
		{"empty EDK", func(h *rawHeader) { h.edks = edkBytes("p", "i", "") }, envelope.ErrMalformed, "without"},
		{"long provider ID", func(h *rawHeader) { h.edks = be(2, 257) }, envelope.ErrLimit, "257"},
		{"long provider information", func(h *rawHeader) { h.edks = append(field("p"), be(2, 4097)...) }, envelope.ErrLimit, "4097"},
		{"long EDK", func(h *rawHeader) { h.edks = slices.Concat(field("p"), field("i"), be(2, 8193)) }, envelope.ErrLimit, "8193"},
		{"content type 0", func(h *rawHeader) { h.content = []byte{0} }, envelope.ErrMalformed, "content type 0"},
		{"content type 3", func(h *rawHeader) { h.content = []byte{3} }, envelope.ErrMalformed, "content type 3"},
		{"framed, length 0", func(h *rawHeader) { h.frameLength = be(4, 0) }, envelope.ErrMalformed, "frame length 0"},
		{"not framed, length 1", func(h *rawHeader) { h.content, h.frameLength = []byte{1}, be(4, 1) }, envelope.ErrMalformed, "frame length 1"},
		{"long frames", func(h *rawHeader) { h.frameLength = be(4, envelope.MaxFrameLength+1) }, envelope.ErrLimit, "67108865"},
		{"large header", func(h *rawHeader) {
			h.edkCount = be(2, 9)
			h.edks = bytes.Repeat(edkBytes("p", "", strings.Repeat("x", envelope.MaxEDKSize)), 9)
		}, envelope.ErrLimit, "header"},
	} {
		h := goodHeader()
		tt.change(&h)
		message := append(h.bytes(), emptyFinal...)
		_, err := envelope.Parse(message)
		_, errReader := envelope.NewReader(bytes.NewReader(message))
		for _, err := range []error{err, errReader} {
			if !errors.Is(err, tt.target) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: %v; want %v with %q", tt.name, err, tt.target, tt.want)
			}
		}
	}
}

// TestParseBodies: frames out of order, missing, oversized or behind the last.
func TestParseBodies(t *testing.T) {
	regular := func(n uint64) []byte { return slices.Concat(be(4, n), make([]byte, 12+4+16)) }
	final := func(n, length uint64) []byte {
		return slices.Concat(be(4, 0xFFFFFFFF), be(4, n), make([]byte, 12), be(4, length), make([]byte, length+16))
	}
	short := goodHeader()
	short.frameLength = be(4, 4)
	whole := goodHeader()
	whole.content, whole.frameLength = []byte{1}, be(4, 0)
	block := func(length uint64) []byte { return slices.Concat(make([]byte, 12), be(8, length), make([]byte, 16)) }
	for _, tt := range []struct {
		name   string
		header rawHeader
		body   []byte
		target error
	}{
		{"starts at 0", short, slices.Concat(regular(0), final(1, 0)), envelope.ErrMalformed},
		{"starts at 2", short, final(2, 0), envelope.ErrMalformed},
		{"number left out", short, slices.Concat(regular(1), final(3, 0)), envelope.ErrMalformed},
		{"number twice", short, slices.Concat(regular(1), regular(1), final(2, 0)), envelope.ErrMalformed},
		{"no last frame", short, regular(1), envelope.ErrTruncated},
		{"no frame", short, nil, envelope.ErrTruncated},
		{"two last frames", short, slices.Concat(final(1, 0), final(2, 0)), envelope.ErrMalformed},
		{"last frame too long", short, final(1, 5), envelope.ErrMalformed},
		{"body too large", whole, block(envelope.MaxNonFramedSize + 1), envelope.ErrLimit},
		{"body enormous", whole, block(1<<64 - 1), envelope.ErrLimit},
		{"body shorter than said", whole, block(1), envelope.ErrTruncated},
	} {
		if _, err := envelope.Parse(append(tt.header.bytes(), tt.body...)); !errors.Is(err, tt.target) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.target)
		}
	}
}

// TestHeaderRoundTrip: what parses marshals back, and the Reader agrees.
func TestHeaderRoundTrip(t *testing.T) {
	for name, message := range shortMessages(t) {
		if err := roundTrip(message); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func roundTrip(message []byte) error {
	m, err := envelope.Parse(message)
	if err != nil {
		return err
	}
	body, err := envelope.MarshalBody(m)
	if err != nil {
		return err
	}
	if got := append(envelope.MarshalHeader(&m.Header), body...); !bytes.Equal(got, message) {
		return errors.New("it marshals to something else")
	}
	r, err := envelope.NewReader(bytes.NewReader(message))
	if err != nil {
		return err
	}
	if !bytes.Equal(envelope.MarshalHeader(r.Header()), envelope.MarshalHeader(&m.Header)) {
		return errors.New("Reader and Parse see different headers")
	}
	return nil
}
