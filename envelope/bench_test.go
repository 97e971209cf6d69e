package envelope_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"io"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/envelope"
)

func BenchmarkSeal1KiB(b *testing.B) {
	key, edks, context, plaintext := testKey(), testEDKs(1), testContext(), testPlaintext(1<<10)
	dst := make([]byte, 0, 4<<10)
	b.SetBytes(1 << 10)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := envelope.Seal(dst, key, edks, context, plaintext); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpen1KiB parses and opens.
func BenchmarkOpen1KiB(b *testing.B) {
	message := mustSeal(b, testPlaintext(1<<10))
	dst := make([]byte, 0, 4<<10)
	key := testKey()
	b.SetBytes(1 << 10)
	b.ReportAllocs()
	for b.Loop() {
		m, err := envelope.Parse(message)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := m.Open(dst, key); err != nil {
			b.Fatal(err)
		}
	}
}

const benchFrames = 256

func rawGCM(tb testing.TB) cipher.AEAD {
	block, err := aes.NewCipher(testKey())
	if err != nil {
		tb.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		tb.Fatal(err)
	}
	return aead
}

// sealRaw encrypts as many frames as a stream of benchFrames has, and nothing
// else.
func sealRaw(aead cipher.AEAD, dst, frame []byte) {
	var nonce [12]byte
	for range benchFrames {
		aead.Seal(dst[:0], nonce[:], frame, nil)
	}
}

// openRaw decrypts as many sealed frames as they come from a stream, and nothing
// else. Reading is part of it: whoever decrypts a stream has to read it.
func openRaw(tb testing.TB, aead cipher.AEAD, buf, frames []byte) {
	var nonce [12]byte
	r := bytes.NewReader(frames)
	for range benchFrames {
		if _, err := io.ReadFull(r, buf); err != nil {
			tb.Fatal(err)
		}
		if _, err := aead.Open(buf[:0], nonce[:], buf, nil); err != nil {
			tb.Fatal(err)
		}
	}
}

func sealStream(tb testing.TB, w io.Writer, frame []byte) {
	sw, err := envelope.NewWriter(w, testKey(), testEDKs(1), testContext())
	if err != nil {
		tb.Fatal(err)
	}
	for range benchFrames {
		if _, err := sw.Write(frame); err != nil {
			tb.Fatal(err)
		}
	}
	if err := sw.Close(); err != nil {
		tb.Fatal(err)
	}
}

func openStream(tb testing.TB, message []byte) {
	r, err := envelope.NewReader(bytes.NewReader(message))
	if err != nil {
		tb.Fatal(err)
	}
	if err := r.Unlock(testKey()); err != nil {
		tb.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, r); err != nil || n != benchFrames*envelope.StreamFrameLength {
		tb.Fatal(n, err)
	}
}

func BenchmarkRawGCM(b *testing.B) {
	aead, frame := rawGCM(b), make([]byte, envelope.StreamFrameLength)
	dst := make([]byte, 0, len(frame)+aead.Overhead())
	b.SetBytes(benchFrames * envelope.StreamFrameLength)
	for b.Loop() {
		sealRaw(aead, dst, frame)
	}
}

func BenchmarkStreamSeal(b *testing.B) {
	frame := make([]byte, envelope.StreamFrameLength)
	b.SetBytes(benchFrames * envelope.StreamFrameLength)
	b.ReportAllocs()
	for b.Loop() {
		sealStream(b, io.Discard, frame)
	}
}

func BenchmarkStreamOpen(b *testing.B) {
	var message bytes.Buffer
	sealStream(b, &message, make([]byte, envelope.StreamFrameLength))
	b.SetBytes(benchFrames * envelope.StreamFrameLength)
	b.ReportAllocs()
	for b.Loop() {
		openStream(b, message.Bytes())
	}
}

// BenchmarkStreamRatio measures streams against raw AES-256-GCM of the same
// frame size, by turns, and reports their throughputs' ratios: seal-ratio and
// open-ratio, 1 being as fast as raw.
func BenchmarkStreamRatio(b *testing.B) {
	aead, frame := rawGCM(b), make([]byte, envelope.StreamFrameLength)
	dst := make([]byte, 0, len(frame)+aead.Overhead())
	sealed := bytes.Repeat(aead.Seal(nil, make([]byte, 12), frame, nil), benchFrames)
	var message bytes.Buffer
	sealStream(b, &message, frame)
	var rawSeal, seal, rawOpen, open time.Duration
	timed := func(sum *time.Duration, f func()) {
		began := time.Now()
		f()
		*sum += time.Since(began)
	}
	b.SetBytes(benchFrames * envelope.StreamFrameLength)
	for b.Loop() {
		timed(&rawSeal, func() { sealRaw(aead, dst, frame) })
		timed(&seal, func() { sealStream(b, io.Discard, frame) })
		timed(&rawOpen, func() { openRaw(b, aead, dst[:cap(dst)], sealed) })
		timed(&open, func() { openStream(b, message.Bytes()) })
	}
	b.ReportMetric(float64(rawSeal)/float64(seal), "seal-ratio")
	b.ReportMetric(float64(rawOpen)/float64(open), "open-ratio")
	b.ReportMetric(0, "ns/op")
}
