package agent_test

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// randomRig is faultyRig with the random of that backend, which is the same byte for
// ever, mixed in.
func randomRig(t *testing.T) *rig {
	t.Helper()
	r := faultyRig(t)
	r.write(r.text() + "random: { backend: faulty }\nmetrics: { address: \"127.0.0.1:0\" }\n")
	return r
}

func (r *rig) text() string {
	r.t.Helper()
	text, err := os.ReadFile(r.config)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(text)
}

func full(s *adminv1.StatusResponse) bool {
	return s.GetRandom().GetPooledBytes() == s.GetRandom().GetPoolSize() && s.GetRandom() != nil
}

// drawn draws random of a length and returns it, within its time.
func drawn(t *testing.T, c *client.Client, length uint32) []byte {
	t.Helper()
	began := time.Now()
	answer, err := c.GenerateRandom(t.Context(), &kmsagentv1.GenerateRandomRequest{Length: length})
	if took := time.Since(began); err != nil || len(answer.GetRandom()) != int(length) || took > time.Second {
		t.Fatalf("random: %d bytes, %v, after %v", len(answer.GetRandom()), err, took)
	}
	return answer.GetRandom()
}

// Data keys and random have the backend's in them, and are good although that is the
// same byte for ever.
func TestRandomOfABackend(t *testing.T) {
	r := randomRig(t)
	r.start()
	r.await("the pool is full", full)
	c, seen := r.as("orders"), map[string]bool{}
	for range 5 {
		key, err := c.GenerateDataKey(t.Context(), &kmsagentv1.GenerateDataKeyRequest{Key: "orders"})
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range [][]byte{key.GetPlaintext(), drawn(t, c, 32)} {
			if seen[string(b)] || len(b) != 32 || bytes.Contains(b, bytes.Repeat([]byte{0xc5}, 8)) {
				t.Errorf("%x", b)
			}
			seen[string(b)] = true
		}
	}
	s, err := r.status()
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range s.GetRandom().GetUses() {
		if u.GetMixed() != 5 || u.GetMixedBytes() != 5*32 || u.GetUnmixed() != 0 {
			t.Errorf("%v, want five that are mixed", u)
		}
	}
	for _, want := range []string{
		`kms_agent_random_requests_total{mixed="true",use="data-key"} 5`, `kms_agent_random_bytes_total{mixed="true",use="generate-random"} 160`,
		`kms_agent_random_requests_total{mixed="false",use="data-key"} 0`, "kms_agent_random_failing 0",
		`kms_agent_upstream_calls_total{backend="faulty",call="random",class="ok"}`,
	} {
		if _, text := get(t, r.metricsURL(s)); !strings.Contains(text, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
}

// Whatever becomes of the backend's random, and of the backend: operations go on, and
// status and metrics tell.
func TestOperationsGoOnWithoutRandom(t *testing.T) {
	for _, what := range []string{"wait in random", "hang in random", "error in random", "panic in random", "exit at start"} {
		t.Run(what, func(t *testing.T) {
			r := randomRig(t)
			r.start()
			s := r.await("the pool is full", full)
			c := r.as("orders")
			message := encryptTo(t, c, "orders")
			decryptOf(t, c, message) // cached from here on
			r.fault(what)
			if pid := int(s.GetBackends()[0].GetPid()); what == "exit at start" {
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			for range 10 {
				drawn(t, c, 4096)
				decryptOf(t, c, message)
				encryptTo(t, c, "orders")
				encryptTo(t, c, "archive")
			}
			s = r.await("status tells", func(s *adminv1.StatusResponse) bool { return s.GetRandom().GetLastError() != "" })
			if got := s.GetRandom().GetUses()[1]; got.GetUnmixed() == 0 || got.GetMixed() == 0 || s.GetState() != "degraded" || !strings.Contains(fmt.Sprint(s.GetProblems()), "random is the system's alone") {
				t.Errorf("state %s, problems %q, random %v", s.GetState(), s.GetProblems(), s.GetRandom())
			}
			if code, text := get(t, r.metricsURL(s)); code != http.StatusOK || !strings.Contains(text, "kms_agent_random_failing 1") ||
				!strings.Contains(text, fmt.Sprintf(`kms_agent_random_requests_total{mixed="false",use="generate-random"} %d`, s.GetRandom().GetUses()[1].GetUnmixed())) {
				t.Errorf("metrics do not tell: %d", code)
			}
		})
	}
}

// An outage of random ends by itself.
func TestRandomComesBack(t *testing.T) {
	r := randomRig(t)
	r.fault("wait in random")
	r.start()
	r.await("status tells", func(s *adminv1.StatusResponse) bool { return s.GetRandom().GetLastError() != "" })
	r.fault("none")
	s := r.await("the pool is full", full)
	if s.GetRandom().GetLastError() != "" {
		t.Errorf("%v", s.GetRandom())
	}
}

// The backend of random may change without a restart; one that is known to have none is
// refused.
func TestRandomIsReloaded(t *testing.T) {
	r := faultyRig(t)
	without := r.text()
	r.fault("no random")
	r.start()
	if s, err := r.status(); err != nil || s.GetRandom() != nil {
		t.Errorf("%v, %v; want no random", s.GetRandom(), err)
	}
	r.await("the backend is up", func(s *adminv1.StatusResponse) bool { return s.GetBackends()[0].GetState() == "up" })
	r.write(without + "random: { backend: faulty }\n")
	r.await("the refusal", func(s *adminv1.StatusResponse) bool {
		return strings.Contains(s.GetConfiguration().GetRejected(), `random.backend: backend "faulty" gives no random`) && s.GetRandom() == nil
	})
	r.fault("none")
	if _, err := r.admin().RestartPlugin(t.Context(), &adminv1.RestartPluginRequest{Backend: "faulty"}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.admin().Reload(t.Context(), &adminv1.ReloadRequest{}); err != nil {
		t.Fatal(err)
	}
	r.await("the pool is full", full)
	drawn(t, r.as("orders"), 32)
	r.write(without)
	r.await("the reload", func(s *adminv1.StatusResponse) bool { return s.GetRandom() == nil })
	drawn(t, r.as("orders"), 32)
}

// What a plugin cannot do is not known before it was started: the agent serves, and says so.
func TestStartWithABackendWithoutRandom(t *testing.T) {
	r := randomRig(t)
	r.fault("no random")
	r.startIn("degraded")
	r.await("status tells", func(s *adminv1.StatusResponse) bool {
		return strings.Contains(s.GetRandom().GetLastError(), "does not have the capability random")
	})
	drawn(t, r.as("orders"), 32)
	encryptTo(t, r.as("orders"), "orders")
	// It holds up no other change: that may take a permission away.
	r.write(strings.Replace(r.text(), "spiffe://example.org/peer", "spiffe://example.org/stranger", 1))
	r.await("the reload", generationAfter(1))
	encryptTo(t, r.as("stranger"), "orders")
}
