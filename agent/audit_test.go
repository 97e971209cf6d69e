package agent_test

import (
	"bytes"
	"net"
	"os"
	"os/signal"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/agent/audit"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// withAudit is configText with more in the audit section.
func withAudit(more string) string {
	return configText("audit: { file: audit.log, initial_key: initial.key }", "audit: { file: audit.log, initial_key: initial.key, "+more+" }")
}

// verifyAudit verifies the log in the rig's directory, with its checkpoints.
func (r *rig) verifyAudit() audit.Report {
	r.t.Helper()
	text, err := os.ReadFile(r.path("initial.key"))
	if err != nil {
		r.t.Fatal(err)
	}
	key, err := audit.ParseInitialKey(text)
	if err != nil {
		r.t.Fatal(err)
	}
	var o audit.VerifyOptions
	if text, err := os.ReadFile(r.path("checkpoints")); err == nil {
		if o.Checkpoints, err = audit.ParseCheckpoints(bytes.NewReader(text)); err != nil {
			r.t.Fatal(err)
		}
	}
	report, err := audit.VerifyFiles(key, o, r.path("audit.log"))
	if err != nil {
		r.t.Fatal(err)
	}
	return report
}

// Every place that the configuration names has the records; equal denials are
// few; checkpoints prove the end of the log.
func TestRecordsEverywhere(t *testing.T) {
	r := newRig(t, "")
	r.write(withAudit(`sinks: [{ syslog: syslog.sock, required: true }, { file: ocsf.log, format: ocsf }],
  checkpoints: { file: checkpoints, every: 1s }, coalesce_denials: 1h`))
	daemon, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: r.path("syslog.sock"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = daemon.Close() })
	received := make(chan string, 1000)
	go func() {
		buffer := make([]byte, 64<<10)
		for {
			n, err := daemon.Read(buffer)
			if err != nil {
				return
			}
			received <- string(buffer[:n])
		}
	}()
	r.start()
	c := r.as("orders")
	encryptTo(t, c, "orders")
	for range 50 {
		_, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "archive"})
		wantReason(t, err, "ACCESS_DENIED")
	}
	s := r.await("coalesced denials", func(s *adminv1.StatusResponse) bool { return s.GetAudit().GetCoalesced() == 49 })
	if sinks := s.GetAudit().GetSinks(); len(sinks) != 2 || !sinks[0].GetRequired() || sinks[0].GetWritten() == 0 || sinks[1].GetFormat() != "ocsf" {
		t.Errorf("status of the sinks: %v", sinks)
	}
	r.stop()
	log := r.auditLog()
	if n := strings.Count(log, `"outcome":"denied"`); n != 2 || !strings.Contains(log, `"count":49,`) {
		t.Errorf("%d records of 50 equal denials; want one, and one with a count of 49:\n%s", n, log)
	}
	report := r.verifyAudit()
	if !report.OK() || report.TailUnproven {
		t.Errorf("verify: %v, tail unproven: %v; want whole and proven", report.Fault, report.TailUnproven)
	}
	var messages strings.Builder
	for range report.Records {
		select {
		case m := <-received:
			messages.WriteString(m)
		case <-time.After(10 * time.Second):
			t.Fatalf("syslog has no message for each of %d records:\n%s", report.Records, messages.String())
		}
	}
	if n := strings.Count(messages.String(), ">1 "); n != int(report.Records) || !strings.Contains(messages.String(), `operation="encrypt" key="orders" outcome="success"`) {
		t.Errorf("syslog has %d messages of %d records", n, report.Records)
	}
	events, err := os.ReadFile(r.path("ocsf.log"))
	if err != nil || bytes.Count(events, []byte(`"class_uid":6003`)) != int(report.Records) {
		t.Errorf("OCSF events: %v; want %d:\n%s", err, report.Records, events)
	}
}

// A required sink that is out: no answer, for nobody; the agent stays up and
// serves again by itself.
func TestRequiredSinkIsOut(t *testing.T) {
	r := newRig(t, "")
	r.write(withAudit(`write_timeout: 500ms, sinks: [{ syslog: syslog.sock, required: true }]`))
	listen := func() *net.UnixConn {
		daemon, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: r.path("syslog.sock"), Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = daemon.Close() })
		go func() { // few datagrams wait in a socket that nobody reads
			for buffer := make([]byte, 64<<10); err == nil; {
				_, err = daemon.Read(buffer)
			}
		}()
		return daemon
	}
	daemon := listen()
	r.start()
	c := r.as("orders")
	encryptTo(t, c, "orders")
	_ = daemon.Close()
	_ = os.Remove(r.path("syslog.sock"))
	_, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
	wantReason(t, err, "AUDIT_UNAVAILABLE")
	listen()
	r.await("service again", func(s *adminv1.StatusResponse) bool { return s.GetState() == "serving" })
	encryptTo(t, c, "orders")
	r.stop()
	if report := r.verifyAudit(); !report.OK() {
		t.Errorf("verify: %v", report.Fault)
	}
}

// With on_failure: answer a full disk does not stop the agent: it says so, and
// the log tells how many records it lacks.
func TestAnswersWithoutRecords(t *testing.T) {
	r := newRig(t, "")
	r.write(withAudit("on_failure: answer"))
	r.startIn("degraded")
	r.await("the backend", func(s *adminv1.StatusResponse) bool { return s.GetBackends()[0].GetState() == "up" })
	c := r.as("orders")
	encryptTo(t, c, "orders")
	signal.Ignore(unix.SIGXFSZ)
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	limit := func(size uint64) {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: before.Max}); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { limit(before.Cur) })
	limit(uint64(len(r.auditLog())))
	for range 3 {
		encryptTo(t, c, "orders")
	}
	s := r.await("the loss", func(s *adminv1.StatusResponse) bool { return s.GetAudit().GetUnrecorded() >= 3 })
	if s.GetState() != "degraded" || !strings.Contains(strings.Join(s.GetProblems(), "\n"), "on_failure is answer") {
		t.Errorf("status %s, %v; want degraded because of on_failure", s.GetState(), s.GetProblems())
	}
	limit(before.Cur)
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(r.auditLog(), audit.EventUnrecorded); time.Sleep(20 * time.Millisecond) {
		encryptTo(t, c, "orders")
		if time.Now().After(deadline) {
			t.Fatal("the log does not tell of what it lacks")
		}
	}
	r.stop()
	if report := r.verifyAudit(); !report.OK() {
		t.Errorf("verify: %v", report.Fault)
	}
}
