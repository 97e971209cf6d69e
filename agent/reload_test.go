package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kms-agent/kms-agent/agent"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// strangersToo gives the stranger what the peer had.
var strangersToo = []string{"spiffe://example.org/peer", "spiffe://example.org/stranger"}

func generationAfter(n uint64) func(*adminv1.StatusResponse) bool {
	return func(s *adminv1.StatusResponse) bool { return s.GetConfiguration().GetGeneration() > n }
}

func TestStatusIsToldDuringAReload(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	r.write(configText("keystore: keystore", "keystore: missing", "call_timeout: 2s", "start_timeout: 3s"))
	longest, refused := time.Duration(0), false
	for deadline := time.Now().Add(20 * time.Second); !refused && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		began := time.Now()
		s, err := r.status()
		if err != nil {
			t.Fatal(err)
		}
		longest, refused = max(longest, time.Since(began)), s.GetConfiguration().GetRejected() != ""
	}
	if !refused || longest > 2*time.Second {
		t.Errorf("refused: %v; one status took %v, while a backend was waited for", refused, longest)
	}
}

func TestABackendThatIsDownHoldsUpNothing(t *testing.T) {
	r := newRig(t, configText())
	if err := os.Rename(r.path("keystore"), r.path("hidden")); err != nil {
		t.Fatal(err)
	}
	r.startIn("not-serving")
	r.write(configText(append(strangersToo, "call_timeout: 2s", "call_timeout: 1s")...))
	s := r.await("the reload", func(s *adminv1.StatusResponse) bool {
		return s.GetConfiguration().GetGeneration() > 1 || s.GetConfiguration().GetRejected() != ""
	})
	if why := s.GetConfiguration().GetRejected(); why != "" {
		t.Fatalf("rejected: %s; the backend was down before too", why)
	}
	_, err := r.as("stranger").Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
	wantReason(t, err, "BACKEND_UNAVAILABLE")
}

func TestAKeyMovesOnlyToABackendThatWorks(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	r.write(configText("- name: local", "- name: other", "backend: local", "backend: other",
		"keystore: keystore", "keystore: missing", "call_timeout: 2s", "start_timeout: 1s"))
	r.await("the refusal", func(s *adminv1.StatusResponse) bool {
		return strings.Contains(s.GetConfiguration().GetRejected(), "does not start")
	})
	if _, err := r.as("orders").Wrap(t.Context(), &kmsagentv1.WrapRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
		t.Errorf("the old backend does not go on: %v", err)
	}
}

func TestAPluginGetsTheNewContentOfItsEnvironmentsFiles(t *testing.T) {
	r := newRig(t, configText("    call_timeout: 2s\n", "    env_from_files: { UNUSED_TOKEN: token }\n"))
	writeFile(t, r.path("token"), "one")
	r.start()
	pid := r.await("a process", func(s *adminv1.StatusResponse) bool { return s.GetBackends()[0].GetPid() > 0 }).GetBackends()[0].GetPid()
	writeFile(t, r.path("token"), "two")
	s := r.await("the reload", generationAfter(1))
	now := s.GetBackends()[0].GetPid()
	if now == pid || now == 0 {
		t.Fatalf("pid = %d, before %d; want another process", now, pid)
	}
	r.await("the end of the old process", func(*adminv1.StatusResponse) bool {
		return errors.Is(syscall.Kill(int(pid), 0), syscall.ESRCH)
	})
	if err := os.Remove(r.path("token")); err != nil {
		t.Fatal(err)
	}
	r.write(configText(append(strangersToo, "    call_timeout: 2s\n", "    env_from_files: { UNUSED_TOKEN: token }\n")...))
	s = r.await("the next reload", generationAfter(s.GetConfiguration().GetGeneration()))
	if again := s.GetBackends()[0].GetPid(); again != now {
		t.Errorf("pid = %d, before %d; a file that is gone is no reason to stop a process", again, now)
	}
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A file that changes while the agent starts is read too.
func TestChangedWhileItStarts(t *testing.T) {
	r := newRig(t, configText())
	r.between = func() { r.write(configText(strangersToo...)) }
	r.start()
	r.await("the reload", generationAfter(1))
	if _, err := r.as("stranger").Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"}); err != nil {
		t.Errorf("after the reload: %v", err)
	}
}

// What no event tells of: the directory has been replaced, or the file is a link
// into another.
func TestReloadWithoutAnEvent(t *testing.T) {
	r := newRig(t, configText())
	for _, dir := range []string{"etc", "else", "policies"} {
		if err := os.Mkdir(r.path(dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, r.path("else/rules"), "[]\n")
	if err := os.Symlink(r.path("else/rules"), r.path("etc/rules")); err != nil {
		t.Fatal(err)
	}
	r.write(configText() + "policy_files: [etc/rules, \"policies/*.yml\"]\n")
	r.start()
	rule := func(name string) string {
		return "- { name: " + name + ", callers: [\"spiffe://example.org/stranger\"], keys: [orders], operations: [encrypt] }\n"
	}
	writeFile(t, r.path("else/rules"), rule("link"))
	s := r.await("the file behind the link", generationAfter(1))
	if err := os.RemoveAll(r.path("etc")); err != nil {
		t.Fatal(err)
	}
	r.await("the refusal", func(s *adminv1.StatusResponse) bool { return s.GetConfiguration().GetRejected() != "" })
	if err := os.Mkdir(r.path("etc"), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, r.path("etc/rules"), rule("again"))
	s = r.await("the directory that came back", generationAfter(s.GetConfiguration().GetGeneration()))
	writeFile(t, filepath.Join(r.path("policies"), "more.yml"), rule("more"))
	r.await("a new file", generationAfter(s.GetConfiguration().GetGeneration()))
}

// A mark that some editors begin files with, and the line ends of others.
func TestConfigOfOtherEditors(t *testing.T) {
	for name, text := range map[string]string{
		"byte order mark": "\ufeff" + smallest,
		"line ends":       strings.ReplaceAll(smallest, "\n", "\r\n"),
	} {
		if _, err := agent.ParseConfig("/x/config.yaml", []byte(text)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNothingIsLeftOfAnAgentThatCannotStart(t *testing.T) {
	r := newRig(t, configText())
	if err := os.MkdirAll(r.path("admin.sock"), 0o700); err != nil {
		t.Fatal(err)
	}
	cfg, err := agent.LoadConfig(r.config)
	if err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(cfg, r.config, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "admin socket") {
		t.Errorf("Run = %v, want what is wrong with the admin socket", err)
	}
	if _, err := os.Stat(r.path("kms.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the native socket is left: %v", err)
	}
	if left, err := os.ReadDir(r.path("run")); err != nil || len(left) != 0 {
		t.Errorf("left in the runtime directory: %v, %v", left, err)
	}
}

// A stream under way when the agent stops has an end on record too.
func TestStopsUnderAStream(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	stream, err := kmsagentv1.NewKMSClient(r.tls("orders")).EncryptStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	start := &kmsagentv1.EncryptStreamStart{Key: "orders"}
	if err := stream.Send(&kmsagentv1.EncryptStreamRequest{Part: &kmsagentv1.EncryptStreamRequest_Start{Start: start}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	r.stop()
	if _, err := stream.Recv(); err == nil {
		t.Error("the stream goes on after the agent")
	}
	text := r.auditText()
	if strings.Count(text, `"kind":"start"`) != 1 || strings.Count(text, `"kind":"end"`) != 1 {
		t.Errorf("want one start and one end on record:\n%s", text)
	}
}

func TestAWrappingKeyBelongsToOneKeyUnderAnyBackendsName(t *testing.T) {
	text := configText("backends:\n", `backends:
  - name: alias
    plugin: local
    settings: { seal: { key_file: keystore.key }, keystore: keystore }
`, `{ name: archive, backend: local, wrapping_key: "local:archive" }`, `{ name: archive, backend: alias, wrapping_key: "local:orders" }`)
	if _, err := agent.ParseConfig("/x/config.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), "belongs to keys[0]") {
		t.Errorf("error = %v; two keys have one wrapping key", err)
	}
}
