package host

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func relayed(most zapcore.Level) (*relay, *observer.ObservedLogs) {
	core, logs := observer.New(zapcore.DebugLevel)
	return newRelay(zap.New(core), "stderr", most), logs
}

func TestRelayParsesLines(t *testing.T) {
	for _, c := range []struct {
		line  string
		level zapcore.Level
		want  map[string]any
	}{
		{`plain text`, zapcore.WarnLevel, map[string]any{"text": "plain text"}},
		{`{"@level":"info","@message":"hello","@timestamp":"now","@module":"m"}`, zapcore.InfoLevel,
			map[string]any{"text": "hello", "plugin.@module": "m"}},
		{`{"level":"error","ts":1,"msg":"zap","key":"orders","n":2,"deep":{"a":[1]}}`, zapcore.ErrorLevel,
			map[string]any{"text": "zap", "plugin.key": "orders", "plugin.n": "2", "plugin.deep": `{"a":[1]}`}},
		{`{"@message":1}`, zapcore.InfoLevel, map[string]any{"text": "", "plugin.@message": "1"}},
		{`{"@level":[],"@message":null}`, zapcore.InfoLevel, map[string]any{"text": "", "plugin.@level": "[]", "plugin.@message": "null"}},
		{`{"@level":"fatal","@message":"x"}`, zapcore.ErrorLevel, map[string]any{"text": "x"}},
		{`{"@level":"TRACE","@message":"x"}`, zapcore.DebugLevel, map[string]any{"text": "x"}},
		{`{"backend":"forged","@message":"x"}`, zapcore.InfoLevel, map[string]any{"text": "x", "plugin.backend": "forged"}},
		{`{broken`, zapcore.WarnLevel, map[string]any{"text": "{broken"}},
		{`[1]`, zapcore.WarnLevel, map[string]any{"text": "[1]"}},
		{`{} {}`, zapcore.WarnLevel, map[string]any{"text": "{} {}"}},
		{"esc \x1b[2J", zapcore.WarnLevel, map[string]any{"text": "esc �[2J"}},
	} {
		r, logs := relayed(zapcore.ErrorLevel)
		_, _ = r.Write([]byte(c.line + "\n"))
		entries := logs.All()
		if len(entries) != 1 {
			t.Errorf("%s: got %d records, want 1", c.line, len(entries))
			continue
		}
		c.want["stream"] = "stderr"
		if diff := cmp.Diff(c.want, entries[0].ContextMap()); diff != "" || entries[0].Level != c.level {
			t.Errorf("%s: got level %s, want %s (-want +got)\n%s", c.line, entries[0].Level, c.level, diff)
		}
	}
}

func TestRelaySplitsLines(t *testing.T) {
	r, logs := relayed(zapcore.DebugLevel)
	for _, part := range []string{"one\ntw", "o", "\n\n  \nthree\r\n", "four"} {
		_, _ = r.Write([]byte(part))
	}
	_ = r.Close()
	_, _ = r.Write([]byte("after the end\n"))
	_ = r.Close()
	var got []string
	for _, e := range logs.All() {
		got = append(got, fmt.Sprint(e.Level, e.ContextMap()["text"]))
	}
	if diff := cmp.Diff([]string{"debugone", "debugtwo", "debugthree", "debugfour"}, got); diff != "" {
		t.Errorf("records (-want +got)\n%s", diff)
	}
}

func TestRelayBoundsLines(t *testing.T) {
	r, logs := relayed(zapcore.ErrorLevel)
	long := bytes.Repeat([]byte("x"), 1<<20)
	for range 20 {
		_, _ = r.Write(long)
	}
	if cap(r.line) > 4*maxLine {
		t.Errorf("a long line takes %d bytes of memory", cap(r.line))
	}
	_, _ = r.Write([]byte("\nshort\n"))
	first, second := logs.All()[0].ContextMap(), logs.All()[1].ContextMap()
	if len(first["text"].(string)) > maxText || first["cut"] != true || second["text"] != "short" || second["cut"] != nil {
		t.Errorf("got %v and %v, want a cut line and a whole one", first, second)
	}
}

func TestRelayBoundsTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, logs := relayed(zapcore.ErrorLevel)
		flood := []byte(strings.Repeat("line\n", 10*linesAtOnce))
		_, _ = r.Write(flood)
		if got := logs.Len(); got != linesAtOnce {
			t.Errorf("at once: got %d records, want %d", got, linesAtOnce)
		}
		time.Sleep(time.Second)
		_, _ = r.Write([]byte("later\n"))
		all := logs.All()
		if got := all[len(all)-1].ContextMap(); got["text"] != "later" || got["lines_dropped"] != int64(9*linesAtOnce) {
			t.Errorf("after a second: got %v, want the line and how many were dropped", got)
		}
		_, _ = r.Write(flood)
		_ = r.Close()
		if got := logs.FilterMessage("plugin logged too much").Len(); got != 1 {
			t.Errorf("at the end: got %d records of dropped lines, want 1", got)
		}
	})
}

func TestHandshakeIsOneLine(t *testing.T) {
	for _, c := range []struct {
		writes     []string
		line, rest string
	}{
		{[]string{"1|1|unix", "|x\nmore\n", "and more"}, "1|1|unix|x\n", "more\nand more"},
		{[]string{"a\n"}, "a\n", ""},
		{[]string{strings.Repeat("x", maxHandshake), "y", "z"}, strings.Repeat("x", maxHandshake) + "\n", "z"},
		{[]string{strings.Repeat("x", 1<<20)}, strings.Repeat("x", maxHandshake) + "\n", ""},
	} {
		var line, rest bytes.Buffer
		h := &handshakeWriter{line: &line, rest: &rest}
		for _, w := range c.writes {
			if n, err := h.Write([]byte(w)); n != len(w) || err != nil {
				t.Errorf("Write of %d bytes: got %d and %v", len(w), n, err)
			}
		}
		if line.String() != c.line || rest.String() != c.rest {
			t.Errorf("%.20q: got %.20q and %.20q, want %.20q and %.20q", c.writes, line.String(), rest.String(), c.line, c.rest)
		}
	}
}

func FuzzRelay(f *testing.F) {
	f.Add([]byte(`{"@message":1}` + "\n"))
	f.Add([]byte(`{"@level":"info","@message":"text","a":{"b":[1,2]}}` + "\n\xff\n"))
	f.Add([]byte("\n\n{\n}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, logs := relayed(zapcore.WarnLevel)
		if n, err := r.Write(b); n != len(b) || err != nil {
			t.Fatalf("Write: got %d and %v", n, err)
		}
		_ = r.Close()
		for _, e := range logs.All() {
			if e.Level > zapcore.WarnLevel || len(e.Context) > maxFields+4 {
				t.Errorf("%q: got %v", b, e)
			}
			for key, value := range e.ContextMap() {
				if text, ok := value.(string); ok && (!utf8.ValidString(text) || utf8.RuneCountInString(text) > maxText || strings.ContainsAny(key+text, "\n\x1b\x00")) {
					t.Errorf("%q: got %q: %q", b, key, text)
				}
			}
		}
	})
}
