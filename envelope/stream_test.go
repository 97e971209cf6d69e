package envelope_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/kms-agent/kms-agent/envelope"
)

const frameLength = envelope.StreamFrameLength

// TestStreamSizes: around every boundary, written and read in pieces of many
// sizes and by io.Copy, the message is the same to the byte.
func TestStreamSizes(t *testing.T) {
	for _, size := range []int{0, 1, frameLength - 1, frameLength, frameLength + 1, 2 * frameLength, 2*frameLength + 1, 5*frameLength + 7} {
		plaintext := testPlaintext(size)
		var want []byte
		for _, piece := range []int{1000, frameLength - 1, frameLength, frameLength + 1, 3 * frameLength, 1 << 30, 0} {
			got := streamInPieces(t, plaintext, piece)
			if want == nil {
				want = got
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%d bytes in pieces of %d: another message than in pieces of 1000", size, piece)
			}
		}
		checkOpens(t, want, testKey(), plaintext)
		for name, r := range map[string]io.Reader{
			"one byte at a time": iotest.OneByteReader(bytes.NewReader(want)),
			"half":               iotest.HalfReader(bytes.NewReader(want)),
			"data with EOF":      iotest.DataErrReader(bytes.NewReader(want)),
		} {
			if got, err := openReader(r, testKey()); err != nil || !bytes.Equal(got, plaintext) {
				t.Errorf("%d bytes read %s: %d bytes, %v", size, name, len(got), err)
			}
		}
	}
}

// streamInPieces writes plaintext piece by piece; 0 leaves it to io.Copy.
func streamInPieces(t *testing.T, plaintext []byte, piece int) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := envelope.NewWriterWithID(testID(), &out, testKey(), testEDKs(1), testContext())
	if err != nil {
		t.Fatal(err)
	}
	if piece == 0 {
		if n, err := io.Copy(w, iotest.HalfReader(bytes.NewReader(plaintext))); err != nil || n != int64(len(plaintext)) {
			t.Fatalf("io.Copy: %d, %v", n, err)
		}
	}
	for rest := plaintext; piece > 0 && len(rest) > 0; {
		n, err := w.Write(rest[:min(piece, len(rest))])
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		rest = rest[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	return out.Bytes()
}

// TestReaderConformance: Read keeps io.Reader's contract.
func TestReaderConformance(t *testing.T) {
	plaintext := testPlaintext(2*frameLength + 100)
	r, err := envelope.NewReader(bytes.NewReader(mustStream(t, plaintext)))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Unlock(testKey()); err != nil {
		t.Fatal(err)
	}
	if err := iotest.TestReader(r, plaintext); err != nil {
		t.Error(err)
	}
}

func TestWriterHeader(t *testing.T) {
	var out bytes.Buffer
	edks, context := testEDKs(2), testContext()
	w, err := envelope.NewWriter(&out, testKey(), edks, context)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	m, err := envelope.Parse(out.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	edks[0].Ciphertext[0]++
	context["tenant"] = "changed later"
	if diff := cmp.Diff(&m.Header, w.Header(), cmpopts.IgnoreUnexported(envelope.Header{})); diff != "" {
		t.Errorf("Header differs from what was written (-written +Header):\n%s", diff)
	}
}

// meter counts what it hands on.
type meter struct {
	r io.Reader
	n int
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.n += n
	return n, err
}

// TestReaderHoldsFewFrames: while a stream is read, at most two frames are
// between the source and the reader of the plaintext, and no plaintext comes
// before its frame has arrived whole.
func TestReaderHoldsFewFrames(t *testing.T) {
	const frames, sealedFrame = 20, 4 + 12 + frameLength + 16
	message := mustStream(t, testPlaintext(frames*frameLength))
	source := &meter{r: bytes.NewReader(message)}
	r, err := envelope.NewReader(source)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Unlock(testKey()); err != nil {
		t.Fatal(err)
	}
	headerSize := len(message) - frames*sealedFrame - 8
	got := 0
	for p := make([]byte, 1000); ; {
		n, err := r.Read(p)
		got += n
		arrived := source.n - headerSize
		if ahead := arrived - got/frameLength*sealedFrame; ahead > 2*sealedFrame {
			t.Fatalf("read %d bytes ahead of byte %d of the plaintext", ahead, got)
		}
		if got > arrived {
			t.Fatalf("%d bytes of plaintext out of %d bytes of frames", got, arrived)
		}
		if held := len(r.Held()); held > 2*sealedFrame {
			t.Fatalf("holds %d bytes", held)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got != frames*frameLength {
		t.Errorf("read %d bytes of %d", got, frames*frameLength)
	}
	if !allZero(r.Held()) {
		t.Error("plaintext is left in memory after the end")
	}
}

func allZero(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }

// TestWriterHoldsFewFrames: what was written is out but for one frame, and
// Close clears what was held.
func TestWriterHoldsFewFrames(t *testing.T) {
	var out bytes.Buffer
	w, err := envelope.NewWriter(&out, testKey(), testEDKs(1), nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		if _, err := w.Write(bytes.Repeat([]byte{0xAA}, 1000)); err != nil {
			t.Fatal(err)
		}
		if behind := (i+1)*1000 - out.Len(); behind > 2*frameLength {
			t.Fatalf("%d bytes written are not out", behind)
		}
	}
	if held := len(w.Held()); held > 2*frameLength {
		t.Errorf("holds %d bytes", held)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if !allZero(w.Held()) {
		t.Error("plaintext is left in memory after Close")
	}
}

// TestReaderGivesVerifiedFramesOnly: a change in the third frame costs that
// frame and all behind it, not one before.
func TestReaderGivesVerifiedFramesOnly(t *testing.T) {
	plaintext := testPlaintext(5 * frameLength)
	message := mustStream(t, plaintext)
	const sealedFrame = 4 + 12 + frameLength + 16
	headerSize := len(message) - 5*sealedFrame - 8
	for _, at := range []int{4, 16, 17, 16 + frameLength - 1, sealedFrame - 1} { // IV, text, tag
		changed := bytes.Clone(message)
		changed[headerSize+2*sealedFrame+at] ^= 1
		got, err := openReader(bytes.NewReader(changed), testKey())
		if !errors.Is(err, envelope.ErrDecrypt) || !bytes.Equal(got, plaintext[:2*frameLength]) {
			t.Errorf("byte %d of frame 3 changed: %d bytes, %v; want two frames and ErrDecrypt", at, len(got), err)
		}
	}
	for name, cut := range map[string]int{
		"in frame 3": headerSize + 2*sealedFrame + 100, "behind frame 2": headerSize + 2*sealedFrame, "in its number": headerSize + 2*sealedFrame + 3,
	} {
		got, err := openReader(bytes.NewReader(message[:cut]), testKey())
		if !errors.Is(err, envelope.ErrTruncated) || !bytes.Equal(got, plaintext[:2*frameLength]) {
			t.Errorf("cut %s: %d bytes, %v; want two frames and ErrTruncated", name, len(got), err)
		}
	}
}

// TestFramesCannotMove: frames neither change places nor come from another
// message under the same data key.
func TestFramesCannotMove(t *testing.T) {
	const sealedFrame = 4 + 12 + frameLength + 16
	message, other := mustStream(t, testPlaintext(3*frameLength)), mustStream(t, testPlaintext(3*frameLength))
	headerSize := len(message) - 3*sealedFrame - 8
	one, two := headerSize, headerSize+sealedFrame
	swapped := bytes.Clone(message)
	copy(swapped[one+4:two], message[two+4:two+sealedFrame]) // all but the number
	copy(swapped[two+4:], message[one+4:two])
	foreign := bytes.Clone(message)
	copy(foreign[one:two], other[one:two])
	for name, m := range map[string][]byte{"swapped": swapped, "of another message": foreign} {
		if _, err := open(m, testKey()); !errors.Is(err, envelope.ErrDecrypt) {
			t.Errorf("frames %s: %v, want ErrDecrypt", name, err)
		}
	}
}

func TestReaderLock(t *testing.T) {
	r, err := envelope.NewReader(bytes.NewReader(mustStream(t, []byte("text"))))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(make([]byte, 10)); n != 0 || err == nil || errors.Is(err, io.EOF) {
		t.Errorf("Read before Unlock: %d, %v; want an error", n, err)
	}
	if err := r.Unlock(count(1, 32)); !errors.Is(err, envelope.ErrDecrypt) {
		t.Errorf("Unlock with a foreign key: %v, want ErrDecrypt", err)
	}
	if err := r.Unlock(testKey()); err != nil {
		t.Errorf("Unlock after a foreign key: %v", err)
	}
	if err := r.Unlock(testKey()); err == nil {
		t.Error("second Unlock: no error")
	}
	if got, err := io.ReadAll(r); err != nil || string(got) != "text" {
		t.Errorf("ReadAll: %q, %v", got, err)
	}
}

// TestReaderPassesErrorsOn: a failing source is neither an end nor damage.
func TestReaderPassesErrorsOn(t *testing.T) {
	message := mustStream(t, testPlaintext(2*frameLength))
	broken := errors.New("broken pipe")
	for _, n := range []int{0, 10, 1000, frameLength + 500, len(message)} {
		r := io.MultiReader(bytes.NewReader(message[:n]), iotest.ErrReader(broken))
		_, err := openReader(r, testKey())
		if !errors.Is(err, broken) || errors.Is(err, envelope.ErrTruncated) {
			t.Errorf("source fails after %d bytes: %v, want its error", n, err)
		}
	}
}

// failWriter fails after n writes.
type failWriter struct{ n int }

var errDisk = errors.New("disk full")

func (w *failWriter) Write(p []byte) (int, error) {
	if w.n--; w.n < 0 {
		return 0, errDisk
	}
	return len(p), nil
}

// TestWriterFailure: after a failed write nothing more is written, and Close
// does not report a whole message.
func TestWriterFailure(t *testing.T) {
	if _, err := envelope.NewWriter(&failWriter{0}, testKey(), testEDKs(1), nil); !errors.Is(err, errDisk) {
		t.Errorf("NewWriter: %v", err)
	}
	w, err := envelope.NewWriter(&failWriter{1}, testKey(), testEDKs(1), nil)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := w.Write(make([]byte, 2*frameLength)); !errors.Is(err, errDisk) || n > frameLength {
		t.Errorf("Write: %d, %v", n, err)
	}
	if _, err := w.Write([]byte("x")); !errors.Is(err, errDisk) {
		t.Errorf("second Write: %v", err)
	}
	if _, err := w.ReadFrom(strings.NewReader("x")); !errors.Is(err, errDisk) {
		t.Errorf("ReadFrom: %v", err)
	}
	if err := w.Close(); !errors.Is(err, errDisk) {
		t.Errorf("Close: %v", err)
	}
	w, err = envelope.NewWriter(&failWriter{1}, testKey(), testEDKs(1), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); !errors.Is(err, errDisk) {
		t.Errorf("Close that cannot write: %v", err)
	}
}

func TestWriterClosed(t *testing.T) {
	w, err := envelope.NewWriter(io.Discard, testKey(), testEDKs(1), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); err == nil {
		t.Error("Write after Close: no error")
	}
	if err := w.Close(); err == nil {
		t.Error("second Close: no error")
	}
}

// TestWriterWithoutClose: a message that was given up is truncated.
func TestWriterWithoutClose(t *testing.T) {
	var out bytes.Buffer
	w, err := envelope.NewWriter(&out, testKey(), testEDKs(1), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(testPlaintext(2 * frameLength)); err != nil {
		t.Fatal(err)
	}
	if _, err := openReader(&out, testKey()); !errors.Is(err, envelope.ErrTruncated) {
		t.Errorf("message without Close: %v, want ErrTruncated", err)
	}
}

type idleReader struct{}

func (idleReader) Read([]byte) (int, error) { return 0, nil }

func TestReadFromErrors(t *testing.T) {
	w, err := envelope.NewWriter(io.Discard, testKey(), testEDKs(1), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.ReadFrom(idleReader{}); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("source without data: %v, want io.ErrNoProgress", err)
	}
	broken := errors.New("broken pipe")
	if n, err := w.ReadFrom(io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(broken))); n != 3 || !errors.Is(err, broken) {
		t.Errorf("failing source: %d, %v", n, err)
	}
}

// TestWriterSequenceEnd: the last number that fits is used, none after it.
func TestWriterSequenceEnd(t *testing.T) {
	w, err := envelope.NewWriter(io.Discard, testKey(), testEDKs(1), nil)
	if err != nil {
		t.Fatal(err)
	}
	w.SetSequence(0xFFFFFFFE)
	if _, err := w.Write(make([]byte, 2*frameLength)); err != nil {
		t.Errorf("regular frame %d: %v", uint32(0xFFFFFFFE), err)
	}
	if _, err := w.Write([]byte("x")); !errors.Is(err, envelope.ErrLimit) {
		t.Errorf("a frame too many: %v, want ErrLimit", err)
	}
}

// TestReaderMemoryFollowsData: a header that announces much makes nobody
// allocate much.
func TestReaderMemoryFollowsData(t *testing.T) {
	message, err := envelope.SealWithID(testID(), nil, testKey(), testEDKs(1), nil, make([]byte, 8<<20))
	if err != nil {
		t.Fatal(err)
	}
	r, err := envelope.NewReader(bytes.NewReader(message[:100<<10]))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Unlock(testKey()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, envelope.ErrTruncated) {
		t.Fatalf("Read: %v", err)
	}
	if held := len(r.Held()); held > 1<<20 {
		t.Errorf("100 KiB of a frame of 8 MiB arrived and %d bytes are held", held)
	}
}
