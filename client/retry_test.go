package client_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/identity"
)

// flaky fails some calls and then answers.
type flaky struct {
	kms
	failures []error
	calls    int
}

func (f *flaky) WhoAmI(context.Context, *kmsagentv1.WhoAmIRequest) (*kmsagentv1.WhoAmIResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.calls <= len(f.failures) {
		return nil, f.failures[f.calls-1]
	}
	return &kmsagentv1.WhoAmIResponse{SpiffeId: "spiffe://dev.local/orders"}, nil
}

// fails has it fail the next calls, and tells how many came before.
func (f *flaky) fails(failures ...error) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := f.calls
	f.failures, f.calls = failures, 0
	return before
}

func soon(t testing.TB, code codes.Code, reason string, after time.Duration) error {
	t.Helper()
	return detailed(t, code, "not now", &errdetails.ErrorInfo{Domain: "kms-agent", Reason: reason}, &errdetails.RetryInfo{RetryDelay: durationpb.New(after)})
}

func TestWhatIsRetried(t *testing.T) {
	ms := time.Millisecond
	silent := detailed(t, codes.Unavailable, "not now", &errdetails.ErrorInfo{Domain: "kms-agent", Reason: "BACKEND_UNAVAILABLE"})
	cases := map[string]struct {
		failures []error
		retry    time.Duration
		calls    int
		want     error // nil: it succeeds
	}{
		"the agent says when":      {[]error{soon(t, codes.Unavailable, "SHUTTING_DOWN", ms), soon(t, codes.Unavailable, "KEY_SUSPENDED", ms)}, 0, 3, nil},
		"the agent says not when":  {[]error{silent}, 0, 1, client.ErrBackendUnavailable},
		"too late for the caller":  {[]error{soon(t, codes.Unavailable, "BACKEND_UNAVAILABLE", time.Hour)}, 0, 1, client.ErrBackendUnavailable},
		"not wanted":               {[]error{soon(t, codes.Unavailable, "BACKEND_UNAVAILABLE", ms)}, -1, 1, client.ErrBackendUnavailable},
		"too many requests":        {[]error{soon(t, codes.ResourceExhausted, "TOO_MANY_REQUESTS", ms)}, 0, 1, client.ErrTooManyRequests},
		"denied":                   {[]error{refusal(t)}, 0, 1, client.ErrAccessDenied},
		"unreached: nobody's word": {[]error{status.Error(codes.Unavailable, "connection reset")}, 0, 2, nil},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			f := &flaky{failures: c.failures}
			path := serveFlaky(t, f)
			_, err := dial(t, client.Options{Socket: path, Retry: c.retry}).WhoAmI(patiently(t))
			if calls := f.fails(); !errors.Is(err, c.want) || calls != c.calls {
				t.Errorf("got %v after %d calls, want %v after %d", err, calls, c.want, c.calls)
			}
		})
	}
}

func TestRetryIsBounded(t *testing.T) {
	f := &flaky{}
	for range 1000 {
		f.failures = append(f.failures, soon(t, codes.Unavailable, "BACKEND_UNAVAILABLE", 10*time.Millisecond))
	}
	path := serveFlaky(t, f)
	c := dial(t, client.Options{Socket: path, Retry: time.Second})
	_, err := c.WhoAmI(patiently(t))
	if calls := f.fails(f.failures...); !errors.Is(err, client.ErrBackendUnavailable) || calls < 2 || calls > 101 {
		t.Errorf("by Retry: %v after %d calls", err, calls)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	c = dial(t, client.Options{Socket: path, Retry: time.Hour})
	if _, err := c.WhoAmI(ctx); !errors.Is(err, client.ErrBackendUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("by the deadline: %v", err)
	}
	f.fails(soon(t, codes.Unavailable, "BACKEND_UNAVAILABLE", time.Minute))
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { _, err := c.WhoAmI(ctx); done <- err }()
	stop()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled while it waits: %v", err)
	}
}

func serveFlaky(t testing.TB, f *flaky) string {
	t.Helper()
	path, _ := serveAt(t, filepath.Join(tempDir(t), "s"), f, self())
	return path
}

// self makes this process a static peer.
func self() identity.Config {
	uid := uint32(os.Getuid())
	return identity.Config{StaticPeers: []identity.StaticPeer{{UID: &uid, ID: orders}}}
}

// An agent that is restarted, or not there yet, is waited for: by calls, and by
// streams that have not begun.
func TestAgentRestarts(t *testing.T) {
	encrypt := func(c *client.Client) error {
		_, err := c.EncryptStream(patiently(t), start, strings.NewReader("x"), io.Discard)
		return err
	}
	ask := func(c *client.Client) error { _, err := c.WhoAmI(patiently(t)); return err }
	for name, calls := range map[string][]func(*client.Client) error{
		"first start, a call": {ask}, "first start, a stream": {encrypt}, "restarts": {ask, ask, ask},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(tempDir(t), "s")
			c := dial(t, client.Options{Socket: path})
			for _, call := range calls {
				done := make(chan error, 1)
				go func() { done <- call(c) }()
				<-tick()
				_, stop := serveAt(t, path, &kms{}, self())
				if err := <-done; err != nil {
					t.Error(err)
				}
				stop()
			}
		})
	}
}

// A server that is not the agent stays so: nothing is gained by asking again.
func TestRefusedServerIsNotRetried(t *testing.T) {
	own := issue(t, domain, agentID, orders)
	unproven, _ := static(t, &kms{})
	for name, o := range map[string]client.Options{
		"another ID": {Socket: proven(t, &kms{}, own[0]), WorkloadAPI: own[1], AgentID: func(id spiffeID) error { return errors.New("not " + id.String()) }},
		"no TLS":     {Socket: unproven, WorkloadAPI: own[1]},
	} {
		o.Retry = time.Hour
		c := dial(t, o)
		if _, err := c.WhoAmI(patiently(t)); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: got %v, want Unavailable at once", name, err)
		}
		if _, err := c.EncryptStream(patiently(t), start, strings.NewReader("x"), io.Discard); status.Code(err) != codes.Unavailable {
			t.Errorf("%s, stream: got %v, want Unavailable at once", name, err)
		}
	}
}

func TestReasons(t *testing.T) {
	err := dial(t, client.Options{Socket: filepath.Join(tempDir(t), "s"), Retry: -1}).Close()
	if err != nil {
		t.Fatal(err)
	}
	var nobody client.Options
	nobody.Socket, nobody.Retry = filepath.Join(tempDir(t), "s"), -1
	_, err = dial(t, nobody).WhoAmI(patiently(t))
	var e *client.Error
	if !errors.Is(err, client.ErrUnreachable) || errors.Is(err, client.ErrBackendUnavailable) || !errors.As(err, &e) || !e.Retryable() {
		t.Errorf("without an agent: %v", err)
	}
	_, err = plain(t, &kms{fail: refusal(t)}).Encrypt(patiently(t), &client.EncryptRequest{})
	if !errors.Is(err, client.ErrAccessDenied) || errors.Is(err, client.ErrUnreachable) || errors.Is(err, client.Reason("")) || errors.As(err, &e) && e.Retryable() {
		t.Errorf("denied: %v", err)
	}
}

// Every reason that the documentation has for operations has a name here.
func TestReasonsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("reasons.go")
	if err != nil {
		t.Fatal(err)
	}
	documented := 0
	for line := range strings.Lines(string(page)) {
		reason, ok := strings.CutPrefix(line, "## ")
		if reason = strings.TrimSpace(reason); !ok || reason != strings.ToUpper(reason) || reason == "CONFIG_REJECTED" {
			continue // of the administration
		}
		documented++
		if !strings.Contains(string(source), `"`+reason+`"`) {
			t.Errorf("reasons.go has no constant for %s", reason)
		}
	}
	if named := strings.Count(string(source), " Reason = "); documented < 10 || named != documented+1 {
		t.Errorf("docs/errors.md has %d reasons, reasons.go %d, want one more (ErrUnreachable)", documented, named)
	}
}

func TestFromEnvironment(t *testing.T) {
	k := &kms{}
	path, _ := static(t, k)
	t.Setenv("KMS_AGENT_SOCKET", "unix://"+path)
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	if _, err := dial(t, client.FromEnvironment()).WhoAmI(patiently(t)); err != nil {
		t.Error(err)
	}
	t.Setenv("KMS_AGENT_SOCKET", "")
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///api")
	if o := client.FromEnvironment(); o.Socket != "" || o.WorkloadAPI != "unix:///api" {
		t.Errorf("got %+v", o)
	}
	c := dial(t, client.Options{Retry: -1})
	if _, err := c.WhoAmI(patiently(t)); err != nil && !strings.Contains(err.Error(), client.DefaultSocket) {
		t.Errorf("without a socket: %v, want the default one to be tried", err)
	}
}

func TestFreshness(t *testing.T) {
	use := &client.KeyUse{Freshness: &kmsagentv1.Freshness{
		Source: client.SourceGrace, Age: durationpb.New(time.Minute), GraceLeft: durationpb.New(time.Hour),
	}}
	if got, want := client.FreshnessOf(use), (client.Freshness{Source: client.SourceGrace, Age: time.Minute, GraceLeft: time.Hour}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := client.FreshnessOf(nil); got != (client.Freshness{}) {
		t.Errorf("of nothing: %+v", got)
	}
	k := &kms{}
	if _, err := plain(t, k).Encrypt(patiently(t), &client.EncryptRequest{MaxStale: client.MaxStale(0)}); err != nil {
		t.Fatal(err)
	}
	if asked := k.lastAsked().(*client.EncryptRequest).MaxStale; asked == nil || asked.AsDuration() != 0 {
		t.Errorf("the agent was asked with max_stale %v, want 0, present", asked)
	}
}
