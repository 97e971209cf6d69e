package audit_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/audit"
)

// with adds a sink to the rig's log.
func (r *rig) with(sinks ...audit.SinkConfig) *rig {
	r.cfg.Sinks = append(r.cfg.Sinks, sinks...)
	return r
}

func (r *rig) path(name string) string { return filepath.Join(filepath.Dir(r.cfg.Path), name) }

func (r *rig) sinkStatus(l *audit.Log, i int, what string, good func(audit.SinkStatus) bool) audit.SinkStatus {
	r.t.Helper()
	var s audit.SinkStatus
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if s = l.Status().Sinks[i]; good(s) {
			return s
		}
	}
	r.t.Fatalf("sink: not %s within 10 s: %+v", what, s)
	return s
}

// A copy is the log, line for line, and rotated by itself.
func TestCopyOfTheLog(t *testing.T) {
	for _, required := range []bool{true, false} {
		t.Run(fmt.Sprint(required), func(t *testing.T) {
			r := newRig(t)
			if err := os.Mkdir(r.path("copy"), 0o700); err != nil {
				t.Fatal(err)
			}
			r.with(audit.SinkConfig{File: r.path("copy/log"), Required: required})
			r.cfg.Rotation = audit.Rotation{MaxSize: 4000}
			r.log(15)
			r.log(15)
			report := r.verifyFiles(r.path("copy"))
			files := 4
			if !required { // it gets more at a time
				files = 2
			}
			if !report.OK() || report.Last != 32 && report.Last != 31 || len(report.Files) < files {
				t.Errorf("copy: last record %d in %d files, fault %v; want a whole log", report.Last, len(report.Files), report.Fault)
			}
		})
	}
}

// While a required sink is out nothing is answered, and nothing is written that
// it would lack; afterwards it has everything.
func TestRequiredSinkThatIsOut(t *testing.T) {
	r := newRig(t)
	copied := &memory{}
	l := r.with(audit.SinkConfig{Sink: copied, Required: true}).open()
	r.write(l, 2)
	copied.set(func(n int) (int, error) { return n / 2, errDisk })
	for i := range 5 {
		if err := l.Write(context.Background(), sample("refused")); !errors.Is(err, audit.ErrSink) || !errors.Is(err, errDisk) {
			t.Fatalf("write %d: %v, want ErrSink", i, err)
		}
		copied.set(func(int) (int, error) { return 0, errDisk })
	}
	if s := l.Status(); !s.Failing || s.Refused != 5 || s.Sinks[0].LastError == "" || s.Sequence != 4 {
		t.Errorf("status %+v; want failing, 5 refused, and one record in the log that the sink lacks", s)
	}
	copied.set(nil)
	r.write(l, 1)
	if s := l.Status(); s.Failing || s.Sinks[0].LastError != "" || s.Sinks[0].Written != 5 {
		t.Errorf("status %+v; want no error, 5 written", s)
	}
	r.close(l)
	if !bytes.Equal(copied.bytes(), r.content()) {
		t.Error("the required sink does not have what the log has")
	}
}

// A sink that is not required holds nobody up, however stuck it is; what it does
// not take is bounded and counted.
func TestStuckSinkThatIsNotRequired(t *testing.T) {
	r := newRig(t)
	r.cfg.WriteTimeout = time.Second
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	l := r.with(audit.SinkConfig{Sink: audit.NewStream(write)}).open()
	big := sample("big")
	big.Detail = strings.Repeat("x", 900<<10)
	for range 40 {
		if err := l.Write(context.Background(), big); err != nil {
			t.Fatalf("Write: %v", err)
		}
	}
	s := r.sinkStatus(l, 0, "losing records", func(s audit.SinkStatus) bool { return s.Lost > 5 })
	if s.Lost > 40 {
		t.Errorf("%d of 41 records lost", s.Lost)
	}
	began := time.Now()
	r.close(l)
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("Close took %v", d)
	}
	r.wantOK(41)
	_ = errors.Join(read.Close(), write.Close()) // which ends the blocked write
}

// A stuck pipe under the log itself: refusals within the timeout, no deadlock,
// and all goes on when somebody reads.
func TestStuckPipe(t *testing.T) {
	r := newRig(t)
	r.cfg.WriteTimeout = 200 * time.Millisecond
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cfg.Sink = audit.NewStream(write)
	l := r.open()
	refused := 0
	for range 400 {
		err := l.Write(context.Background(), sample("stuck"))
		if errors.Is(err, audit.ErrTimeout) {
			refused++
		}
		if refused == 3 {
			break
		}
	}
	if s := l.Status(); refused != 3 || !s.Failing || s.Refused != 3 {
		t.Fatalf("%d refused, status %+v; want 3, failing", refused, s)
	}
	text := make(chan string)
	go func() {
		content, _ := io.ReadAll(read)
		text <- string(content)
	}()
	for deadline := time.Now().Add(10 * time.Second); ; {
		if err := l.Write(context.Background(), sample("again")); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("refused 10 s after the pipe is read")
		}
	}
	if s := l.Status(); s.Failing {
		t.Errorf("status %+v; want not failing", s)
	}
	r.close(l)
	_ = write.Close()
	if report, err := audit.Verify(r.initialKey(), audit.VerifyOptions{}, audit.Input{Name: "pipe", Reader: strings.NewReader(<-text)}); err != nil || !report.OK() {
		t.Errorf("what came through the pipe: %v, %v", report.Fault, err)
	}
}

// strange is a record whose fields need every escape there is.
func strange() *audit.Record {
	r := sample(`r-"1"]\`)
	r.Caller.SPIFFEID = "spiffe://example.org/ü]\"\\\n\x01"
	r.Outcome, r.Reason, r.Detail = audit.Denied, "ACCESS_DENIED", "no rule\n"
	return r
}

var syslogMessage = regexp.MustCompile(`^<(\d{1,3})>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) ([!-~]{1,255}) kms-agent (\d+) (operation|event|start|end) ` +
	`\[meta sequenceId="(\d+)"\]\[kms-agent@32473((?: [a-z_]+="(?:[^"\\\]]|\\["\\\]])*")+)\] (\{.*\})\n?$`)

func wantSyslog(t *testing.T, message string) []string {
	t.Helper()
	parts := syslogMessage.FindStringSubmatch(message)
	if parts == nil || !json.Valid([]byte(parts[8])) {
		t.Fatalf("not a message of RFC 5424: %q", message)
	}
	return parts
}

func TestSyslogDatagrams(t *testing.T) {
	r := newRig(t)
	socket := shortSocket(t)
	listen := func() *net.UnixConn {
		c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	receive := func(c *net.UnixConn) string {
		t.Helper()
		buffer := make([]byte, 1<<20)
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := c.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		return string(buffer[:n])
	}
	daemon := listen()
	l := r.with(audit.SinkConfig{Syslog: socket, Required: true}).open()
	if parts := wantSyslog(t, receive(daemon)); parts[1] != "109" || parts[5] != "event" || parts[6] != "1" {
		t.Errorf("started: PRI %s, MSGID %s, number %s; want 109, event, 1", parts[1], parts[5], parts[6])
	}
	if err := l.Write(context.Background(), strange()); err != nil {
		t.Fatal(err)
	}
	parts := wantSyslog(t, receive(daemon))
	if parts[1] != "108" || !strings.Contains(parts[7], `request_id="r-\"1\"\]\\"`) || !strings.Contains(parts[7], `/ü\]\"\\  "`) {
		t.Errorf("denied: PRI %s, data %s; want 108, everything escaped", parts[1], parts[7])
	}
	if line := strings.Split(string(r.content()), "\n")[1]; line != parts[8] {
		t.Errorf("message %s, want the log's line %s", parts[8], line)
	}
	// Without a daemon there is no answer; with the next one there is.
	_ = daemon.Close()
	_ = os.Remove(socket)
	if err := l.Write(context.Background(), sample("a")); !errors.Is(err, audit.ErrSink) {
		t.Errorf("without a daemon: %v, want ErrSink", err)
	}
	daemon = listen()
	defer func() { _ = daemon.Close() }()
	r.write(l, 1)
	wantSyslog(t, receive(daemon)) // what was written before the loss was known
	wantSyslog(t, receive(daemon))
	big := sample("big")
	big.Detail = strings.Repeat("ü", 400<<10)
	if err := l.Write(context.Background(), big); err != nil {
		t.Fatalf("a record that no datagram holds: %v", err)
	}
	if message := receive(daemon); len(message) != 2048 && len(message) != 2047 || !strings.Contains(message, `request_id="big"`) {
		t.Errorf("a record that no datagram holds: %d bytes: %.100s; want 2 kB of it", len(message), message)
	}
	r.close(l)
}

func shortSocket(t *testing.T) string {
	dir, err := os.MkdirTemp("", "audit")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "log")
}

func TestSyslogStream(t *testing.T) {
	r := newRig(t)
	socket := shortSocket(t)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	r.cfg.WriteTimeout = 2 * time.Second
	l := r.with(audit.SinkConfig{Syslog: socket, Required: true}).open()
	first, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	r.write(l, 2)
	lines := bufio.NewReader(first)
	for range 3 {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		wantSyslog(t, line)
	}
	// The daemon starts anew: the record goes over the next connection, whole.
	_ = first.Close()
	r.write(l, 1)
	second, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = second.Close() }()
	line, err := bufio.NewReader(second).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if parts := wantSyslog(t, line); parts[6] != "4" {
		t.Errorf("over the next connection: record %s, want 4", parts[6])
	}
	r.close(l)
}

// required are the attributes that OCSF 1.3.0 requires of API Activity and of
// the objects in it.
func missingOCSF(event map[string]any) (missing []string) {
	for _, path := range []string{
		"activity_id", "category_uid", "class_uid", "type_uid", "time", "severity_id", "metadata.version",
		"metadata.product.vendor_name", "metadata.product.name", "actor", "api.operation", "src_endpoint.hostname",
	} {
		var at any = event
		for name := range strings.SplitSeq(path, ".") {
			object, _ := at.(map[string]any)
			at = object[name]
		}
		if at == nil || at == "" {
			missing = append(missing, path)
		}
	}
	actor, _ := event["actor"].(map[string]any)
	if actor["user"] == nil && actor["process"] == nil && actor["app_name"] == nil {
		missing = append(missing, "actor: one of user, process, app_name")
	}
	api, _ := event["api"].(map[string]any)
	if request, ok := api["request"].(map[string]any); ok && request["uid"] == nil {
		missing = append(missing, "api.request.uid")
	}
	if event["class_uid"] != 6003.0 || event["category_uid"] != 6.0 {
		missing = append(missing, "class 6003 of category 6")
	}
	if activity, _ := event["activity_id"].(float64); event["type_uid"] != 600300+activity {
		missing = append(missing, "type_uid of the activity")
	}
	return missing
}

func TestOCSF(t *testing.T) {
	r := newRig(t)
	r.cfg.Version = "v9"
	l := r.with(audit.SinkConfig{File: r.path("ocsf.log"), Format: audit.FormatOCSF, Required: true}).open()
	records := []*audit.Record{sample("ok"), strange(), {Kind: audit.KindStart, Operation: "evict"}, {Kind: audit.KindOperation, Operation: "connect", Outcome: audit.Denied}}
	reencrypt := sample("re")
	reencrypt.Operation, reencrypt.Source, reencrypt.DurationMicros, reencrypt.Count = "reencrypt", &audit.KeyUse{Key: "old", KeyVersion: "1"}, 4321, 3
	for _, record := range append(records, reencrypt) {
		if err := l.Write(context.Background(), record); err != nil {
			t.Fatal(err)
		}
	}
	r.close(l)
	content, err := os.ReadFile(r.path("ocsf.log"))
	if err != nil {
		t.Fatal(err)
	}
	var events []map[string]any
	for line := range bytes.SplitSeq(bytes.TrimSpace(content), []byte("\n")) {
		var event map[string]any
		if err := json.Unmarshal(line, &event); err != nil {
			t.Fatal(err)
		}
		if missing := missingOCSF(event); len(missing) > 0 {
			t.Errorf("%s lacks %v", line, missing)
		}
		events = append(events, event)
	}
	if len(events) != 6 {
		t.Fatalf("%d events, want 6", len(events))
	}
	for i, want := range []string{
		`"activity_id":99 "status_id":0 "app_name":"kms-agent" "chain":"`,
		`"activity_id":1 "status_id":1 "severity_id":1 "uid":"spiffe://example.org/ns/shop/sa/orders" "pid":4711 "decision":"allowed" "name":"orders-service" "correlation_uid":"ok" "version":"3" "bytes_in":1024 "mac":" "version":"v9"`,
		`"status_id":2 "severity_id":3 "status_code":"ACCESS_DENIED" "error":"ACCESS_DENIED" "decision":"denied"`,
		`"activity_id":4 "status_id":0`,
		`"activity_id":99 "activity_name":"connect" "decision":"denied"`,
		`"activity_id":3 "name":"old" "duration":4 "count":3`,
	} {
		text, _ := json.Marshal(events[i])
		for part := range strings.SplitSeq(want, " ") {
			if !strings.Contains(string(text), part) {
				t.Errorf("event %d lacks %s: %s", i, part, text)
			}
		}
	}
}

// Whatever stands in a record, what the sinks say of it is in their form.
func FuzzSinkFormats(f *testing.F) {
	f.Add("r-1", "spiffe://example.org/a", "encrypt", "orders", "denied", "ACCESS_DENIED", "detail", uint64(1))
	f.Add("]\"\\\n", "\xff\xfe", "\u2028", "<>", "]", "\x00", "[", uint64(1<<63))
	f.Fuzz(func(t *testing.T, id, caller, operation, key, outcome, reason, detail string, count uint64) {
		r := newRig(t)
		m, o := &memory{}, &memory{}
		socket := shortSocket(t)
		daemon, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = daemon.Close() }()
		l := r.with(audit.SinkConfig{Sink: m, Required: true}, audit.SinkConfig{Sink: o, Format: audit.FormatOCSF, Required: true},
			audit.SinkConfig{Syslog: socket, Required: true}).open()
		record := &audit.Record{Kind: audit.KindOperation, RequestID: id, Caller: audit.Caller{SPIFFEID: caller}, Operation: operation,
			Key: key, Outcome: audit.Outcome(outcome), Reason: reason, Detail: detail, Count: count}
		if err := l.Write(context.Background(), record); err != nil {
			t.Fatal(err)
		}
		r.close(l)
		buffer := make([]byte, 1<<20)
		for range 2 {
			n, err := daemon.Read(buffer)
			if err != nil {
				t.Fatal(err)
			}
			wantSyslog(t, string(buffer[:n]))
		}
		lines := slices.Collect(bytes.Lines(o.bytes()))
		var event map[string]any
		if len(lines) != 2 || json.Unmarshal(lines[1], &event) != nil {
			t.Fatalf("OCSF: %s", o.bytes())
		}
		if missing := missingOCSF(event); len(missing) > 0 {
			t.Errorf("%s lacks %v", lines[1], missing)
		}
	})
}
