package envelope_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/kms-agent/kms-agent/envelope"
)

type vectorEDK struct{ ProviderID, ProviderInfo, Ciphertext string }

type vector struct {
	Name, Writer    string
	PlaintextLength int
	Context         map[string]string
	FrameLength     uint32
	MessageSHA256   string
	Message         string
}

type vectorFile struct {
	DataKey, MessageID       string
	EDKs, EDKsWithoutContext []vectorEDK
	Vectors                  []vector
}

func unhex(tb testing.TB, s string) []byte {
	tb.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func readVectors(tb testing.TB) vectorFile {
	tb.Helper()
	raw, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		tb.Fatal(err)
	}
	var f vectorFile
	if err := json.Unmarshal(raw, &f); err != nil {
		tb.Fatal(err)
	}
	if len(f.Vectors) < 13 {
		tb.Fatalf("%d vectors, want all 13", len(f.Vectors))
	}
	return f
}

func (f vectorFile) edks(tb testing.TB, v vector) []envelope.EDK {
	tb.Helper()
	from := f.EDKs
	if len(v.Context) == 0 {
		from = f.EDKsWithoutContext
	}
	var edks []envelope.EDK
	for _, e := range from {
		edks = append(edks, envelope.EDK{ProviderID: e.ProviderID, ProviderInfo: unhex(tb, e.ProviderInfo), Ciphertext: unhex(tb, e.Ciphertext)})
	}
	return edks
}

// write makes the vector's message with this package.
func (f vectorFile) write(t *testing.T, v vector) []byte {
	t.Helper()
	id := [envelope.MessageIDSize]byte(unhex(t, f.MessageID))
	if v.Writer == "seal" {
		message, err := envelope.SealWithID(id, nil, unhex(t, f.DataKey), f.edks(t, v), v.Context, testPlaintext(v.PlaintextLength))
		if err != nil {
			t.Fatalf("Seal: %v", err)
		}
		return message
	}
	var out bytes.Buffer
	w, err := envelope.NewWriterWithID(id, &out, unhex(t, f.DataKey), f.edks(t, v), v.Context)
	if err != nil {
		t.Fatalf("NewWriter: %v", err)
	}
	if _, err := w.Write(testPlaintext(v.PlaintextLength)); err != nil {
		t.Fatalf("Write: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	return out.Bytes()
}

// TestVectors: vectors.json was made by testdata/vectors.mjs, which shares no
// code with this package. What we write is the same to the byte, and what
// others may write opens.
func TestVectors(t *testing.T) {
	f := readVectors(t)
	for _, v := range f.Vectors {
		t.Run(v.Name, func(t *testing.T) {
			message := unhex(t, v.Message)
			if v.Writer != "other" {
				message = f.write(t, v)
			}
			if sum := sha256.Sum256(message); hex.EncodeToString(sum[:]) != v.MessageSHA256 {
				t.Fatalf("message has SHA-256 %x, want the frozen %s", sum, v.MessageSHA256)
			}
			m, err := envelope.Parse(message)
			if err != nil {
				t.Fatalf("Parse: %v", err)
			}
			want := envelope.Header{MessageID: testID(), Context: v.Context, EDKs: f.edks(t, v), FrameLength: v.FrameLength}
			if diff := cmp.Diff(want, m.Header, cmpopts.IgnoreUnexported(envelope.Header{}), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("header differs (-want +got):\n%s", diff)
			}
			checkOpens(t, message, unhex(t, f.DataKey), testPlaintext(v.PlaintextLength))
		})
	}
}

// checkOpens opens a message both as a whole and as a stream.
func checkOpens(t *testing.T, message, dataKey, want []byte) {
	t.Helper()
	got, err := open(message, dataKey)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("Open gave %d bytes, %v; want the %d of the plaintext", len(got), err, len(want))
	}
	got, err = openReader(bytes.NewReader(message), dataKey)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("Reader gave %d bytes, %v; want the %d of the plaintext", len(got), err, len(want))
	}
}

// TestFIPSOnly: the format works where the standard library refuses all but
// approved cryptography.
func TestFIPSOnly(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^(TestVectors|TestSealOpen|TestStreamSizes|TestEveryTruncation)$", "-test.v")
	cmd.Env = append(os.Environ(), "GODEBUG=fips140=only")
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestVectors")) {
		t.Errorf("with GODEBUG=fips140=only: %v\n%s", err, out)
	}
}

// TestAWSVectors: the format's owner published these. Those that must not open
// commit to another data key.
func TestAWSVectors(t *testing.T) {
	raw, err := os.ReadFile("testdata/aws.json")
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		Tests []struct {
			Comment, Plaintext string
			DataKey, Message   []byte
			Opens              bool
		}
	}
	if err := json.Unmarshal(raw, &f); err != nil || len(f.Tests) != 4 {
		t.Fatalf("%d tests, %v", len(f.Tests), err)
	}
	for _, tt := range f.Tests {
		t.Run(tt.Comment, func(t *testing.T) {
			if tt.Opens {
				checkOpens(t, tt.Message, tt.DataKey, []byte(tt.Plaintext))
				return
			}
			if _, err := open(tt.Message, tt.DataKey); !errors.Is(err, envelope.ErrDecrypt) {
				t.Errorf("Open: %v, want ErrDecrypt", err)
			}
		})
	}
}
