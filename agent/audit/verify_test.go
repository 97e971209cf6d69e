package audit_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/kms-agent/kms-agent/agent/audit"
)

// keys are the first n keys of a chain, as docs/audit.md specifies them.
func keys(initial []byte, n int) [][]byte {
	all := [][]byte{initial}
	for len(all) < n {
		h := hmac.New(sha256.New, all[len(all)-1])
		h.Write([]byte("kms-agent audit 1: next key"))
		all = append(all, h.Sum(nil))
	}
	return all
}

var signed = regexp.MustCompile(`^(\{"sequence":([0-9]+),.*,"previous":"([0-9a-f]{64})"),"mac":"([0-9a-f]{64})"\}$`)

// The chain as docs/audit.md specifies it, verified without the package.
func TestTheChainIsTheSpecifiedOne(t *testing.T) {
	r := newRig(t)
	r.log(20)
	previous := strings.Repeat("0", 64)
	for i, line := range strings.Split(strings.TrimSpace(string(r.content())), "\n") {
		m := signed.FindStringSubmatch(line)
		if m == nil || m[2] != fmt.Sprint(i+1) || m[3] != previous || !json.Valid([]byte(line)) {
			t.Fatalf("line %d is not of the form, or not next: %s", i+1, line)
		}
		h := hmac.New(sha256.New, keys(r.initialKey(), i+1)[i])
		h.Write([]byte(m[1]))
		if previous = hex.EncodeToString(h.Sum(nil)); m[4] != previous {
			t.Fatalf("line %d: MAC %s, want %s", i+1, m[4], previous)
		}
	}
}

// Frozen: what these lines say must verify for ever.
const frozenKey = "kms-agent-audit-key-1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8\n"

func swapLines(content []byte, i, j int) []byte {
	lines := bytes.SplitAfter(content, []byte("\n"))
	lines[i], lines[j] = lines[j], lines[i]
	return bytes.Join(lines, nil)
}

func deleteLine(content []byte, i int) []byte {
	lines := bytes.SplitAfter(content, []byte("\n"))
	return bytes.Join(append(lines[:i:i], lines[i+1:]...), nil)
}

func insertLine(content []byte, i int, line []byte) []byte {
	lines := bytes.SplitAfter(content, []byte("\n"))
	return bytes.Join(append(append(lines[:i:i], line), lines[i:]...), nil)
}

func lineOf(content []byte, i int) []byte { return bytes.SplitAfter(content, []byte("\n"))[i] }

func TestTamperingIsFound(t *testing.T) {
	r := newRig(t)
	r.log(9) // lines 1 to 10
	stranger := newRig(t)
	stranger.log(9)
	whole := r.content()
	cases := []struct {
		name    string
		content []byte
		line    int
		reason  audit.Reason
		options audit.VerifyOptions
	}{
		{"a value edited", bytes.Replace(whole, []byte("request-3"), []byte("request-4"), 1), 5, audit.ReasonEdited, audit.VerifyOptions{}},
		{"first line edited", bytes.Replace(whole, []byte("audit-started"), []byte("audit-stopped"), 1), 1, audit.ReasonEdited, audit.VerifyOptions{}},
		{"last line edited", bytes.Replace(whole, []byte("request-8"), []byte("request-9"), 1), 10, audit.ReasonEdited, audit.VerifyOptions{}},
		{"a field added", bytes.Replace(whole, []byte(`"door":"native"`), []byte(`"door":"native","x":1`), 1), 2, audit.ReasonEdited, audit.VerifyOptions{}},
		{"a space added", bytes.Replace(whole, []byte(`"door":`), []byte(`"door": `), 1), 2, audit.ReasonEdited, audit.VerifyOptions{}},
		{"a sequence number edited", bytes.Replace(whole, []byte(`{"sequence":5,`), []byte(`{"sequence":6,`), 1), 5, audit.ReasonEdited, audit.VerifyOptions{}},
		{"a line made rubbish", insertLine(deleteLine(whole, 4), 4, []byte("rubbish\n")), 5, audit.ReasonEdited, audit.VerifyOptions{}},
		{"a line without its end", bytes.Replace(whole, []byte("\"}\n{\"sequence\":6,"), []byte("\n{\"sequence\":6,"), 1), 5, audit.ReasonEdited, audit.VerifyOptions{}},
		{"head removed", deleteLine(whole, 0), 1, audit.ReasonRemoved, audit.VerifyOptions{}},
		{"long head removed", bytes.Join(bytes.SplitAfter(whole, []byte("\n"))[6:], nil), 1, audit.ReasonRemoved, audit.VerifyOptions{}},
		{"middle removed", deleteLine(whole, 4), 5, audit.ReasonRemoved, audit.VerifyOptions{}},
		{"tail removed", cutLines(whole, 3), 7, audit.ReasonRemoved, audit.VerifyOptions{AtLeast: 10}},
		{"all removed", nil, 0, audit.ReasonRemoved, audit.VerifyOptions{}},
		{"neighbours swapped", swapLines(whole, 4, 5), 5, audit.ReasonReordered, audit.VerifyOptions{}},
		{"far lines swapped", swapLines(whole, 2, 7), 3, audit.ReasonReordered, audit.VerifyOptions{}},
		{"first lines swapped", swapLines(whole, 0, 1), 1, audit.ReasonReordered, audit.VerifyOptions{}},
		{"a record repeated", insertLine(whole, 5, lineOf(whole, 4)), 6, audit.ReasonInserted, audit.VerifyOptions{}},
		{"an old record repeated", insertLine(whole, 8, lineOf(whole, 1)), 9, audit.ReasonInserted, audit.VerifyOptions{}},
		{"last record repeated", insertLine(whole, 10, lineOf(whole, 9)), 11, audit.ReasonInserted, audit.VerifyOptions{}},
		{"a stranger's record", insertLine(whole, 5, lineOf(stranger.content(), 5)), 6, audit.ReasonInserted, audit.VerifyOptions{}},
		{"rubbish between", insertLine(whole, 5, []byte("rubbish\n")), 6, audit.ReasonInserted, audit.VerifyOptions{}},
		{"an empty line", insertLine(whole, 5, []byte("\n")), 6, audit.ReasonInserted, audit.VerifyOptions{}},
		{"a very long line", insertLine(whole, 5, append(bytes.Repeat([]byte("x"), 5<<20), '\n')), 6, audit.ReasonInserted, audit.VerifyOptions{}},
		{"another log", stranger.content(), 1, audit.ReasonWrongKey, audit.VerifyOptions{}},
		{"another log's end", deleteLine(stranger.content(), 0), 1, audit.ReasonWrongKey, audit.VerifyOptions{}},
		{"another log's last file", deleteLine(stranger.content(), 0), 1, audit.ReasonWrongKey, audit.VerifyOptions{From: 2}},
		{"another log behind", append(bytes.Clone(whole), stranger.content()...), 11, audit.ReasonEdited, audit.VerifyOptions{}},
		{"last line cut", whole[:len(whole)-20], 10, audit.ReasonTorn, audit.VerifyOptions{}},
		{"too early a start", whole, 1, audit.ReasonInserted, audit.VerifyOptions{From: 2}},
	}
	for _, c := range cases {
		report, err := audit.Verify(r.initialKey(), c.options, audit.Input{Name: "log", Reader: bytes.NewReader(c.content)})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		f := report.Fault
		if f == nil || report.OK() {
			t.Errorf("%s: not found", c.name)
			continue
		}
		if f.File != "log" || f.Line != c.line || f.Reason != c.reason {
			t.Errorf("%s: got %v, want log:%d: %s", c.name, f, c.line, c.reason)
		}
	}
	if !r.wantOK(10).OK() {
		t.Error("the log that the cases change is not good")
	}
}

func TestEveryChangedByteIsFound(t *testing.T) {
	r := newRig(t)
	r.log(2)
	whole, key := r.content(), r.initialKey()
	for i := range whole {
		changed := bytes.Clone(whole)
		changed[i] ^= 1
		report, err := audit.Verify(key, audit.VerifyOptions{}, audit.Input{Reader: bytes.NewReader(changed)})
		if err != nil || report.OK() {
			// The last newline carries nothing.
			if i != len(whole)-1 || err != nil {
				t.Errorf("byte %d changed from %q to %q: %v, %v", i, whole[i], changed[i], report.Fault, err)
			}
		}
	}
	for n := range whole {
		report, err := audit.Verify(key, audit.VerifyOptions{AtLeast: 3}, audit.Input{Reader: bytes.NewReader(whole[:n])})
		if err != nil || report.OK() && n != len(whole)-1 {
			t.Errorf("cut to %d bytes of %d: not found, %v", n, len(whole), err)
		}
	}
}

func TestEveryFieldIsCovered(t *testing.T) {
	r := newRig(t)
	r.cfg.ContextValues = audit.ContextClear
	r.log(3)
	whole := r.content()
	for _, value := range []string{
		`"sequence":3`, `"time":"2`, `"kind":"o`, `request-1`, `"door":"n`, `ns/shop`, `x509`, `"uid":1`, `"gid":1`, `"pid":4`,
		`"operation":"e`, `"key":"o`, `"key_version":"3`, `"tenant":"7`, `"message_id":"5`, `"rule":"o`, `"outcome":"s`,
		`"source":"c`, `"age_ms":1`, `"backend":"l`, `"duration_us":8`, `"bytes_in":1`, `"bytes_out":1`, `"previous":"`, `"mac":"`,
	} {
		lines := bytes.SplitAfter(bytes.Clone(whole), []byte("\n"))
		i := bytes.Index(lines[2], []byte(value))
		if i < 0 {
			t.Fatalf("no %s in %s", value, lines[2])
		}
		at := &lines[2][i+len(value)-1]
		if strings.HasSuffix(value, `":"`) {
			at = &lines[2][i+len(value)]
		}
		if *at == '1' {
			*at = '2'
		} else {
			*at = '1'
		}
		report, err := audit.Verify(r.initialKey(), audit.VerifyOptions{}, audit.Input{Name: "log", Reader: bytes.NewReader(bytes.Join(lines, nil))})
		if err != nil || report.Fault == nil || report.Fault.Line != 3 {
			t.Errorf("%s edited: %v, %v; want a fault in line 3", value, report.Fault, err)
		}
	}
}

func TestWrongKeyNamesTheChains(t *testing.T) {
	r, other := newRig(t), newRig(t)
	r.log(2)
	other.log(1)
	report, err := audit.Verify(other.initialKey(), audit.VerifyOptions{}, audit.Input{Reader: bytes.NewReader(r.content())})
	if err != nil || report.Fault == nil {
		t.Fatalf("got %v, %v", report.Fault, err)
	}
	for _, chain := range []string{r.wantOK(3).Chain, other.wantOK(2).Chain} {
		if !strings.Contains(report.Fault.Detail, chain) {
			t.Errorf("%q does not name chain %s", report.Fault.Detail, chain)
		}
	}
}

func TestVerifyReportsReadErrors(t *testing.T) {
	r := newRig(t)
	r.log(1)
	broken := errors.New("broken")
	_, err := audit.Verify(r.initialKey(), audit.VerifyOptions{}, audit.Input{Name: "log", Reader: iotest.ErrReader(broken)})
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "log") {
		t.Errorf("got %v", err)
	}
	if _, err := audit.Verify([]byte("short"), audit.VerifyOptions{}); err == nil {
		t.Error("a short key is accepted")
	}
}

func TestUnknownFieldsAreTolerated(t *testing.T) {
	key := audit.NewInitialKey()
	text := `{"sequence":1,"time":"2030-01-01T00:00:00Z","kind":"novelty","of_the_future":{"a":[1]},"previous":"` + strings.Repeat("0", 64) + `"`
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	line := text + `,"mac":"` + hex.EncodeToString(h.Sum(nil)) + `"}` + "\n"
	report, err := audit.Verify(key, audit.VerifyOptions{}, audit.Input{Reader: strings.NewReader(line)})
	if err != nil || !report.OK() || report.Records != 1 {
		t.Errorf("got %+v, fault %v, %v", report, report.Fault, err)
	}
}

func TestInitialKeyFile(t *testing.T) {
	key := audit.NewInitialKey()
	text := audit.FormatInitialKey(key)
	got, err := audit.ParseInitialKey([]byte(" " + text + "\n"))
	if err != nil || !bytes.Equal(got, key) {
		t.Errorf("what FormatInitialKey wrote does not parse: %v", err)
	}
	for _, bad := range []string{"", "key", text[:len(text)-3], text + text, strings.Replace(text, "-1:", "-2:", 1), text[:22] + "!" + text[23:]} {
		if _, err := audit.ParseInitialKey([]byte(bad)); err == nil {
			t.Errorf("%q parses", bad)
		} else if len(bad) > 30 && strings.Contains(err.Error(), bad[22:30]) {
			t.Errorf("the error quotes the key: %v", err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	key, err := audit.ParseInitialKey([]byte(frozenKey))
	if err != nil {
		f.Fatal(err)
	}
	r := newRig(f)
	store(f, r.cfg.StateDir+"/audit-initial.key", []byte(frozenKey))
	r.cfg.Now = clock
	r.log(3)
	whole := r.content()
	f.Add(whole, uint64(0))
	f.Add(swapLines(whole, 1, 2), uint64(0))
	f.Add(deleteLine(whole, 1), uint64(2))
	f.Add(whole[:len(whole)-9], uint64(1))
	f.Add([]byte("{\"sequence\":18446744073709551615,"+strings.Repeat(" ", 300)), uint64(0))
	f.Fuzz(func(t *testing.T, content []byte, from uint64) {
		report, err := audit.Verify(key, audit.VerifyOptions{From: from % 100}, audit.Input{Name: "log", Reader: bytes.NewReader(content)})
		if err != nil {
			t.Fatalf("Verify: %v", err)
		}
		// Only what the chain's owner wrote is good.
		if report.OK() && !bytes.HasPrefix(append(whole, '\n'), bytes.TrimSuffix(content, []byte("\n"))) && from%100 < 2 {
			t.Errorf("good: %q", content)
		}
	})
}
