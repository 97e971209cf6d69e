package agent_test

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// A backend that does not answer is not asked for long: callers learn at once that
// it is out and when to come again, its status says so, and it comes back.
func TestBreaker(t *testing.T) {
	r := faultyRig(t)
	r.start()
	c := r.as("orders")
	good := encryptTo(t, c, "orders")
	decryptOf(t, c, good)
	r.fault("wait in wrap")
	wrap := func() (time.Duration, error) {
		began := time.Now()
		_, err := c.Wrap(t.Context(), &kmsagentv1.WrapRequest{Key: "orders", Plaintext: []byte("x")})
		return time.Since(began), err
	}
	var quickest time.Duration
	for range 30 {
		took, err := wrap()
		e := wantReason(t, err, "BACKEND_UNAVAILABLE")
		if e.RetryAfter <= 0 {
			t.Errorf("no time to come again: %v", err)
		}
		if quickest == 0 || took < quickest {
			quickest = took
		}
	}
	if quickest > 100*time.Millisecond {
		t.Errorf("the quickest refusal took %s, and a call may take 300ms", quickest)
	}
	s := r.await("refusals in the status", func(s *adminv1.StatusResponse) bool { return s.GetBackends()[0].GetRefused() > 0 })
	if b := s.GetBackends()[0]; b.GetBreakerOpened() == 0 || b.GetFailures() == 0 || b.GetBreaker() == "" {
		t.Errorf("status: %v", b)
	}
	// What is cached goes on.
	if _, err := c.Decrypt(t.Context(), &kmsagentv1.DecryptRequest{Message: good}); err != nil {
		t.Errorf("a cached key: %v", err)
	}
	r.fault("none")
	r.recovers(c, good)
	r.await("a closed breaker", func(s *adminv1.StatusResponse) bool {
		_, _ = c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders", MaxStale: durationpb.New(0)})
		return s.GetBackends()[0].GetBreaker() == "closed" && s.GetBackends()[0].GetNextTry() == nil
	})
}
