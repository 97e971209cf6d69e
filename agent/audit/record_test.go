package audit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kms-agent/kms-agent/agent/audit"
)

// written is the line that a log writes for a record.
func written(t testing.TB, values audit.ContextValues, record audit.Record) string {
	t.Helper()
	r := newRig(t)
	m := &memory{}
	r.cfg.Sink, r.cfg.ContextValues, r.cfg.Now = m, values, clock
	l := r.open()
	if err := l.Write(context.Background(), &record); err != nil {
		t.Fatal(err)
	}
	r.close(l)
	return strings.Split(string(m.bytes()), "\n")[1]
}

// wantAsJSON compares a line with what encoding/json makes of the record.
func wantAsJSON(t testing.TB, record audit.Record) {
	t.Helper()
	line := written(t, audit.ContextClear, record)
	record.Sequence = 2
	if record.Time.IsZero() {
		record.Time = clock()
	}
	record.Time = record.Time.UTC()
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(record); err != nil {
		t.Fatal(err)
	}
	want := strings.TrimSuffix(b.String(), "}\n") + `,"previous":"`
	if !strings.HasPrefix(line, want) {
		t.Errorf("line is not as encoding/json writes it\n got %s\nwant %s", line, want)
	}
	var back audit.Record
	if err := json.Unmarshal([]byte(line), &back); err != nil {
		t.Fatalf("the line does not parse: %v\n%s", err, line)
	}
	var same audit.Record
	if err := json.Unmarshal(b.Bytes(), &same); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(same, back); diff != "" {
		t.Errorf("what was read is not what was written (-want +got):\n%s", diff)
	}
}

func TestRecordsAreEncodedAsJSON(t *testing.T) {
	zone := time.FixedZone("east", 7200)
	for _, record := range []audit.Record{
		{},
		*sample("a"),
		{Kind: audit.KindEvent, Operation: "reload", Time: time.Date(2026, 1, 2, 3, 4, 5, 6000, zone)},
		{
			Kind: audit.KindOperation, Source: &audit.KeyUse{}, Freshness: audit.Freshness{GraceLeftMillis: 1},
			Caller: audit.Caller{PID: 1},
		},
		{
			Kind: audit.KindEnd, Source: &audit.KeyUse{Key: "k", KeyVersion: "1", MessageID: "ab", Rule: "r", Freshness: audit.Freshness{Source: "grace", AgeMillis: -1, GraceLeftMillis: 2}},
			Outcome: audit.Denied, Reason: "denied", Detail: "quote \" back \\ slash / < > & \u2028 \u2029 \x7f \x00 \x1f \b\f\n\r\t ü 世 \xff \xed\xa0\x80 end",
			DurationMicros: -5, UpstreamMicros: 1 << 62, BytesIn: 1<<64 - 1, Count: 12, Context: map[string]string{"": "", "b\"": "1", "a": "\xff"},
		},
	} {
		wantAsJSON(t, record)
	}
}

func TestAnyRecordIsEncodedAsJSON(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		text := rapid.StringN(0, 8, 40)
		wantAsJSON(t, audit.Record{
			Time: time.Unix(rapid.Int64Range(0, 1<<33).Draw(rt, "s"), rapid.Int64Range(0, 999999999).Draw(rt, "ns")),
			Kind: audit.KindOperation, RequestID: text.Draw(rt, "id"), Detail: text.Draw(rt, "detail"),
			Caller:  audit.Caller{SPIFFEID: text.Draw(rt, "spiffe"), UID: rapid.Uint32().Draw(rt, "uid")},
			Context: rapid.MapOfN(text, text, 0, 20).Draw(rt, "context"),
			BytesIn: rapid.Uint64().Draw(rt, "in"), DurationMicros: rapid.Int64().Draw(rt, "us"),
		})
	})
}

func FuzzRecord(f *testing.F) {
	f.Add("a", "key", "value")
	f.Add("\x00\"\\", "\u2028", "\xff\xfe")
	f.Add("</script>", "é", "\U0001f511")
	f.Fuzz(func(t *testing.T, detail, name, value string) {
		wantAsJSON(t, audit.Record{Kind: audit.KindEvent, Detail: detail, Context: map[string]string{name: value}})
	})
}

// Frozen: a log of version 1. It must verify, and be written the same, for ever.
func TestFrozenLog(t *testing.T) {
	frozen, err := os.ReadFile(filepath.Join("testdata", "frozen.log"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := audit.ParseInitialKey([]byte(frozenKey))
	if err != nil {
		t.Fatal(err)
	}
	report, err := audit.Verify(key, audit.VerifyOptions{}, audit.Input{Name: "frozen.log", Reader: bytes.NewReader(frozen)})
	if err != nil || !report.OK() || report.Records != 3 || report.Chain != "53187131efd7ffe2" {
		t.Errorf("frozen.log: %+v, fault %v, %v", report, report.Fault, err)
	}
	r := newRig(t)
	store(t, filepath.Join(r.cfg.StateDir, "audit-initial.key"), []byte(frozenKey))
	r.cfg.Now = clock
	r.log(2)
	if diff := cmp.Diff(string(frozen), string(r.content())); diff != "" {
		t.Errorf("the same records are written in another way (-frozen +now):\n%s", diff)
	}
}

func BenchmarkEncode(b *testing.B) {
	record := sample("0123456789abcdef")
	record.Time = clock()
	b.Run("encoding-json", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := json.Marshal(record); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("whole-write", func(b *testing.B) {
		r := newRig(b)
		r.cfg.Sink = &discard{}
		l := r.open()
		b.ReportAllocs()
		for b.Loop() {
			if err := l.Write(context.Background(), record); err != nil {
				b.Fatal(err)
			}
		}
		r.close(l)
	})
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) Sync() error                 { return nil }
func (discard) Close() error                { return nil }
func (discard) String() string              { return "discard" }

// BenchmarkWrite is the time of a record, encoded, sealed and handed to the
// kernel, as many callers see it.
func BenchmarkWrite(b *testing.B) {
	for _, concurrency := range []int{1, 16, 64} {
		b.Run(fmt.Sprint(concurrency), func(b *testing.B) {
			r := newRig(b)
			l := r.open()
			b.SetParallelism(max(concurrency/2, 1))
			b.ReportAllocs()
			b.RunParallel(func(p *testing.PB) {
				record := sample("0123456789abcdef")
				for p.Next() {
					if err := l.Write(context.Background(), record); err != nil {
						b.Fatal(err)
					}
				}
			})
			r.close(l)
		})
	}
}

func BenchmarkVerify(b *testing.B) {
	r := newRig(b)
	r.log(1000)
	content, key := r.content(), r.initialKey()
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		report, err := audit.Verify(key, audit.VerifyOptions{}, audit.Input{Reader: bytes.NewReader(content)})
		if err != nil || !report.OK() {
			b.Fatal(report.Fault, err)
		}
	}
}
