package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kms-agent/kms-agent/agent"
	"github.com/kms-agent/kms-agent/agent/quota"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	"github.com/kms-agent/kms-agent/client"
)

// limitedConfig gives the orders rule limits.
func limitedConfig(limits string) string {
	return configText("describe]\n", "describe]\n    limits: "+limits+"\n")
}

func encrypt(t *testing.T, c *client.Client) error {
	t.Helper()
	_, err := c.Encrypt(t.Context(), &client.EncryptRequest{Key: "orders", Plaintext: []byte("text")})
	return err
}

// A day's limit holds for a running agent, over its restart and after a reload
// that leaves the rule its name; raising it helps at once.
func TestDailyLimitOfAnAgent(t *testing.T) {
	r := newRig(t, limitedConfig("{ per_day: 5 }"))
	r.start()
	for i := range 3 {
		if err := encrypt(t, r.as("orders")); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
	}
	r.stop()
	r.start()
	c := r.as("orders")
	for i := range 2 {
		if err := encrypt(t, c); err != nil {
			t.Fatalf("request %d after a restart: %v", i, err)
		}
	}
	e := wantReason(t, encrypt(t, c), "QUOTA_EXCEEDED")
	left := time.Until(time.Now().UTC().Truncate(24*time.Hour).AddDate(0, 0, 1))
	if difference := left - e.RetryAfter; difference.Abs() > time.Minute {
		t.Errorf("retry after %v, want midnight UTC in %v", e.RetryAfter, left)
	}
	s, err := r.status()
	if err != nil || len(s.GetLimits()) != 1 {
		t.Fatalf("status %v, %v", s, err)
	}
	if l := s.GetLimits()[0]; l.GetRule() != "orders" || l.GetLimits() != "per_day 5" || l.GetCallers() != 1 || l.GetRefused()["per_day"] != 1 {
		t.Errorf("status %v", l)
	}
	r.write(limitedConfig("{ per_day: 6, rate: 1000/s }"))
	r.await("the reload", generationAfter(1))
	if err := encrypt(t, c); err != nil {
		t.Errorf("after the limit was raised: %v", err)
	}
	wantReason(t, encrypt(t, c), "QUOTA_EXCEEDED")
	log, err := os.ReadFile(r.path("audit.log"))
	if err != nil || !strings.Contains(string(log), `"rule":"orders","outcome":"denied","reason":"QUOTA_EXCEEDED"`) {
		t.Errorf("the audit log does not tell of the refusal: %v\n%s", err, log)
	}
}

// While a count cannot be stored, it is not served, status says why, and all is
// well again when it can.
func TestCountsWithoutADisk(t *testing.T) {
	r := newRig(t, limitedConfig("{ per_day: 1000 }"))
	r.start()
	c := r.as("orders")
	obstacle := r.path("state/quota.state.new")
	if err := os.MkdirAll(filepath.Join(obstacle, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	wantReason(t, encrypt(t, c), "QUOTA_UNAVAILABLE")
	r.await("the problem", func(s *adminv1.StatusResponse) bool {
		return s.GetState() == "degraded" && strings.Contains(strings.Join(s.GetProblems(), "\n"), "quota.state")
	})
	if err := os.RemoveAll(obstacle); err != nil {
		t.Fatal(err)
	}
	r.await("its end", func(s *adminv1.StatusResponse) bool { return s.GetState() == "serving" })
	if err := encrypt(t, c); err != nil {
		t.Error(err)
	}
}

// An agent does not start on counts that it cannot read, and says what to do.
func TestDamagedCounts(t *testing.T) {
	r := newRig(t, limitedConfig("{ per_day: 5 }"))
	path := r.path("state/quota.state")
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("rubbish"), 0o600)); err != nil {
		t.Fatal(err)
	}
	cfg, err := agent.LoadConfig(r.config)
	if err != nil {
		t.Fatal(err)
	}
	_, err = agent.New(cfg, r.config, zap.NewNop())
	if !errors.Is(err, quota.ErrState) || !strings.Contains(err.Error(), "remove it") {
		t.Fatalf("error = %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	r.start()
	if err := encrypt(t, r.as("orders")); err != nil {
		t.Error(err)
	}
}
