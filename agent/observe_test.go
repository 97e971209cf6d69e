package agent_test

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	collectorv1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = answer.Body.Close() }()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(body)
}

// metricsURL is where status says that the metrics are.
func (r *rig) metricsURL(s *adminv1.StatusResponse) string {
	r.t.Helper()
	for _, l := range s.GetListeners() {
		if url, ok := strings.CutPrefix(l, "metrics "); ok {
			return url
		}
	}
	r.t.Fatalf("status names no metrics: %v", s.GetListeners())
	return ""
}

func TestMetricsOfARunningAgent(t *testing.T) {
	r := newRig(t, configText()+"metrics: { address: \"127.0.0.1:0\" }\n")
	r.start()
	s, err := r.status()
	if err != nil {
		t.Fatal(err)
	}
	url := r.metricsURL(s)
	everyOperation(t, r.as("orders"))
	_, err = r.as("stranger").Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
	wantReason(t, err, "ACCESS_DENIED")
	code, text := get(t, url)
	if code != http.StatusOK {
		t.Fatalf("metrics: %d %s", code, text)
	}
	for _, want := range []string{
		`kms_agent_requests_total{door="native",operation="encrypt",outcome="success",reason=""}`,
		`kms_agent_requests_total{door="native",operation="encrypt",outcome="denied",reason="ACCESS_DENIED"} 1`,
		`kms_agent_caller_requests_total{caller="spiffe://example.org/orders",operation="decrypt"}`,
		`kms_agent_caller_upstream_calls_total{backend="local",caller="spiffe://example.org/orders"}`,
		`kms_agent_upstream_calls_total{backend="local",call="wrap",class="ok"}`,
		`kms_agent_backend_state{backend="local",state="up"} 1`,
		`kms_agent_state{state="serving"} 1`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	base := strings.TrimSuffix(url, "/metrics")
	if code, text := get(t, base+"/readyz"); code != http.StatusOK || text != "serving\n" {
		t.Errorf("readyz = %d %q", code, text)
	}
	if code, _ := get(t, base+"/livez"); code != http.StatusOK {
		t.Errorf("livez = %d", code)
	}
	if code, _ := get(t, base+"/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiles are open to the network: %d", code)
	}
}

// collector is an OTLP collector that keeps what it gets.
type collector struct {
	collectorv1.UnimplementedTraceServiceServer
	address string

	mu    sync.Mutex
	spans []*tracev1.Span
}

func (c *collector) Export(_ context.Context, r *collectorv1.ExportTraceServiceRequest) (*collectorv1.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, resource := range r.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			c.spans = append(c.spans, scope.GetSpans()...)
		}
	}
	return &collectorv1.ExportTraceServiceResponse{}, nil
}

func (c *collector) of(trace string) map[string]*tracev1.Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	found := map[string]*tracev1.Span{}
	for _, s := range c.spans {
		if hex.EncodeToString(s.GetTraceId()) == trace {
			found[s.GetName()] = s
		}
	}
	return found
}

func newCollector(t *testing.T) *collector {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &collector{address: l.Addr().String()}
	server := grpc.NewServer()
	collectorv1.RegisterTraceServiceServer(server, c)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Errorf("collector: %v", err)
		}
	})
	return c
}

// A caller's trace goes on at the door and reaches the plugin.
func TestTracesFromTheDoorToThePlugin(t *testing.T) {
	c := newCollector(t)
	r := newRig(t, configText()+fmt.Sprintf("tracing: { endpoint: \"http://%s\", sample: 0 }\n", c.address))
	r.start()
	const trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+trace+"-"+caller+"-01")
	if _, err := r.as("orders").Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: []byte("secret-payload")}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.as("orders").Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"}); err != nil {
		t.Fatal(err)
	}
	r.stop() // sends what is left
	spans := c.of(trace)
	door, wrap := spans["kmsagent.v1.KMS/Encrypt"], spans["kmsagent.plugin.v1.Backend/Wrap"]
	if door == nil || wrap == nil {
		t.Fatalf("spans of the caller's trace: %v, want those of door and plugin", spans)
	}
	if hex.EncodeToString(door.GetParentSpanId()) != caller || string(wrap.GetParentSpanId()) != string(door.GetSpanId()) {
		t.Errorf("caller %s, door %x below %x, plugin below %x", caller, door.GetSpanId(), door.GetParentSpanId(), wrap.GetParentSpanId())
	}
	text := door.String()
	for _, want := range []string{"kms_agent.key", "orders", "kms_agent.request_id", "upstream", "spiffe://example.org/orders"} {
		if !strings.Contains(text, want) {
			t.Errorf("the door's span lacks %q: %s", want, text)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if strings.Contains(s.String(), "secret-payload") {
			t.Errorf("a span holds the payload: %v", s)
		}
		if hex.EncodeToString(s.GetTraceId()) != trace {
			t.Errorf("with sample: 0 a trace of the agent's own was sent: %v", s)
		}
	}
}

// A collector that is away costs traces, never answers nor the agent's end.
func TestNoCollectorNoHarm(t *testing.T) {
	r := newRig(t, configText()+"tracing: { endpoint: \"http://127.0.0.1:1\", sample: 1 }\n")
	r.start()
	everyOperation(t, r.as("orders"))
	began := time.Now()
	r.stop()
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("the agent took %v to stop", took)
	}
}
