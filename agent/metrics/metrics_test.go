package metrics_test

import (
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/metrics"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// scrape reads the metrics as Prometheus does.
func scrape(t *testing.T, m *metrics.Metrics) (families map[string]*dto.MetricFamily, text []byte) {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(w.Body.Bytes()))
	if err != nil || w.Code != 200 {
		t.Fatalf("status %d: %v", w.Code, err)
	}
	return families, w.Body.Bytes()
}

// value finds the series of a metric that has all of the labels.
func value(t *testing.T, families map[string]*dto.MetricFamily, name string, labels ...string) float64 {
	t.Helper()
	for _, series := range families[name].GetMetric() {
		var have []string
		for _, l := range series.GetLabel() {
			have = append(have, l.GetName()+"="+l.GetValue())
		}
		if slices.ContainsFunc(labels, func(want string) bool { return !slices.Contains(have, want) }) {
			continue
		}
		switch {
		case series.GetCounter() != nil:
			return series.GetCounter().GetValue()
		case series.GetGauge() != nil:
			return series.GetGauge().GetValue()
		default:
			return float64(series.GetHistogram().GetSampleCount())
		}
	}
	t.Errorf("no series of %s with %v", name, labels)
	return -1
}

func fullStatus() *adminv1.StatusResponse {
	return &adminv1.StatusResponse{
		State: "degraded", Version: "v1", Fips140: "off", Started: timestamppb.New(time.Unix(1000, 0)),
		Configuration: &adminv1.Configuration{Generation: 3, Loaded: timestamppb.New(time.Unix(2000, 0)), Rejected: "x"},
		Identity:      &adminv1.Identity{State: "stale", Expires: timestamppb.New(time.Unix(3000, 0)), Updated: timestamppb.New(time.Unix(2500, 0))},
		Backends: []*adminv1.BackendStatus{{
			Name: "hsm", State: "up", Restarts: 2, PluginVersion: "v2", Fips140: "v1.0.0",
			Breaker: "half-open", BreakerOpened: 3, FailureRate: 0.25, Refused: 40, Retries: 5,
		}},
		Keys: []*adminv1.KeyStatus{
			{Name: "orders", EncryptConfirmed: durationpb.New(4 * time.Second), DecryptConfirmed: durationpb.New(5 * time.Second), Problem: "x"},
			{Name: "fresh"},
		},
		Cache:       &adminv1.CacheStatus{EncryptionKeys: 1, DecryptionKeys: 2, MaxEntries: 10, LockedBytes: 4096, Hits: 5, Misses: 6, Refreshes: 7, Evictions: 8},
		Limits:      []*adminv1.LimitsStatus{{Rule: "orders", Callers: 3, Refused: map[string]uint64{"rate": 6}}},
		LimitsError: "x",
		Random: &adminv1.RandomStatus{Backend: "hsm", PooledBytes: 4096, PoolSize: 8192, LastError: "x", Uses: []*adminv1.RandomUse{
			{Use: "data-key", Mixed: 11, MixedBytes: 12, Unmixed: 13, UnmixedBytes: 14}, {Use: "generate-random"},
		}},
		Store: &adminv1.StoreStatus{
			DataKeys: 3, Saved: timestamppb.New(time.Unix(2600, 0)), Saves: 6, Failures: 2, Restored: 4, RefusedReason: "damaged", Problem: "x",
		},
		Audit: &adminv1.AuditStatus{Sequence: 9, Refused: 1, LastError: "x", Unrecorded: 4, Coalesced: 5,
			Sinks:       []*adminv1.AuditSink{{Name: "syslog /dev/log", Written: 7, Lost: 2, LastError: "x"}, {Name: "/a", Written: 9}},
			Checkpoints: &adminv1.AuditSink{Name: "syslog /dev/log", Written: 1},
		},
	}
}

// busy is Metrics that have seen one of everything.
func busy() *metrics.Metrics {
	m := metrics.New(2, fullStatus)
	ok := audit.Record{
		Kind: audit.KindOperation, Door: "native", Operation: "encrypt", Key: "orders", Outcome: audit.Success,
		Caller: audit.Caller{SPIFFEID: "spiffe://example.org/a"}, Freshness: audit.Freshness{Source: "cached"},
		DurationMicros: 70, BytesIn: 100, BytesOut: 200,
	}
	m.Operation(&ok)
	denied := ok
	denied.Outcome, denied.Reason, denied.Key = audit.Denied, "ACCESS_DENIED", "made-up"
	m.Operation(&denied)
	m.UpstreamCall("hsm", "wrap", "", "spiffe://example.org/a", time.Millisecond)
	m.UpstreamCall("hsm", "unwrap", "unavailable", "", time.Second)
	m.SparedCall("hsm", "unwrap", "breaker-open")
	m.RefusedConnection("native", "handshake")
	return m
}

func TestOperationsAndCalls(t *testing.T) {
	f, text := scrape(t, busy())
	for _, want := range []struct {
		name   string
		labels []string
		value  float64
	}{
		{"kms_agent_requests_total", []string{"outcome=success", "reason=", "operation=encrypt", "door=native"}, 1},
		{"kms_agent_requests_total", []string{"outcome=denied", "reason=ACCESS_DENIED"}, 1},
		{"kms_agent_request_duration_seconds", []string{"operation=encrypt"}, 1},
		{"kms_agent_key_answers_total", []string{"key=orders", "freshness=cached"}, 1},
		{"kms_agent_key_bytes_total", []string{"key=orders", "direction=in"}, 100},
		{"kms_agent_caller_requests_total", []string{"caller=spiffe://example.org/a"}, 2},
		{"kms_agent_caller_bytes_total", []string{"direction=out"}, 200},
		{"kms_agent_caller_upstream_calls_total", []string{"caller=spiffe://example.org/a", "backend=hsm"}, 1},
		{"kms_agent_caller_upstream_calls_total", []string{"caller=agent"}, 1},
		{"kms_agent_upstream_calls_total", []string{"class=ok", "call=wrap"}, 1},
		{"kms_agent_upstream_calls_total", []string{"class=unavailable", "call=unwrap"}, 1},
		{"kms_agent_state", []string{"state=degraded"}, 1},
		{"kms_agent_state", []string{"state=serving"}, 0},
		{"kms_agent_backend_state", []string{"backend=hsm", "state=up"}, 1},
		{"kms_agent_backend_breaker_state", []string{"backend=hsm", "state=half-open"}, 1},
		{"kms_agent_backend_breaker_state", []string{"backend=hsm", "state=open"}, 0},
		{"kms_agent_backend_breaker_opened_total", []string{"backend=hsm"}, 3},
		{"kms_agent_backend_failure_ratio", []string{"backend=hsm"}, 0.25},
		{"kms_agent_backend_refused_calls_total", []string{"backend=hsm"}, 40},
		{"kms_agent_backend_retries_total", []string{"backend=hsm"}, 5},
		{"kms_agent_upstream_calls_total", []string{"class=breaker-open", "call=unwrap"}, 1},
		{"kms_agent_identity_svid_expiry_time_seconds", nil, 3000},
		{"kms_agent_key_confirmation_age_seconds", []string{"key=orders", "direction=decrypt"}, 5},
		{"kms_agent_cache_data_keys", []string{"direction=decrypt"}, 2},
		{"kms_agent_random_requests_total", []string{"use=data-key", "mixed=true"}, 11},
		{"kms_agent_random_requests_total", []string{"use=data-key", "mixed=false"}, 13},
		{"kms_agent_random_bytes_total", []string{"use=data-key", "mixed=false"}, 14},
		{"kms_agent_random_bytes_total", []string{"use=generate-random", "mixed=true"}, 0},
		{"kms_agent_random_pool_bytes", nil, 4096},
		{"kms_agent_random_failing", nil, 1},
		{"kms_agent_store_data_keys", nil, 3},
		{"kms_agent_store_last_save_time_seconds", nil, 2600},
		{"kms_agent_store_saves_total", []string{"outcome=success"}, 4},
		{"kms_agent_store_saves_total", []string{"outcome=error"}, 2},
		{"kms_agent_store_restored_data_keys", nil, 4},
		{"kms_agent_store_failing", nil, 1},
		{"kms_agent_store_refused", []string{"reason=damaged"}, 1},
		{"kms_agent_limit_callers", []string{"rule=orders"}, 3},
		{"kms_agent_limit_refused_total", []string{"rule=orders", "limit=rate"}, 6},
		{"kms_agent_limit_failing", nil, 1},
		{"kms_agent_audit_failing", nil, 1},
		{"kms_agent_audit_unrecorded_total", nil, 4},
		{"kms_agent_audit_coalesced_denials_total", nil, 5},
		{"kms_agent_audit_sink_records_total", []string{"sink=syslog /dev/log"}, 8},
		{"kms_agent_audit_sink_lost_records_total", []string{"sink=syslog /dev/log"}, 2},
		{"kms_agent_audit_sink_failing", []string{"sink=/a"}, 0},
		{"kms_agent_config_rejected", nil, 1},
	} {
		if got := value(t, f, want.name, want.labels...); got != want.value {
			t.Errorf("%s%v = %v, want %v", want.name, want.labels, got, want.value)
		}
	}
	if bytes.Contains(text, []byte("made-up")) {
		t.Error("a key's name that a caller made up has become a label")
	}
	if n := len(f["kms_agent_key_confirmation_age_seconds"].GetMetric()); n != 2 {
		t.Errorf("%d ages of confirmations, want 2: a key without one has no age", n)
	}
}

// Where no backend's random is configured there is nothing to alert on.
func TestRandomIsAbsentWithoutABackend(t *testing.T) {
	f, _ := scrape(t, metrics.New(2, func() *adminv1.StatusResponse { return &adminv1.StatusResponse{} }))
	for name := range f {
		if strings.HasPrefix(name, "kms_agent_random_") {
			t.Errorf("%s is exposed", name)
		}
	}
}

// A flood of callers does not become a flood of time series.
func TestCallersAreBounded(t *testing.T) {
	m := metrics.New(2, fullStatus)
	for i := range 100 {
		m.Operation(&audit.Record{Operation: "encrypt", Outcome: audit.Denied, Caller: audit.Caller{SPIFFEID: fmt.Sprintf("spiffe://example.org/%d", i)}})
	}
	m.Operation(&audit.Record{Operation: "encrypt", Outcome: audit.Denied})
	f, _ := scrape(t, m)
	if n := len(f["kms_agent_caller_requests_total"].GetMetric()); n != 4 {
		t.Errorf("%d series, want 4: two callers, other, unidentified", n)
	}
	if got := value(t, f, "kms_agent_caller_requests_total", "caller=other"); got != 98 {
		t.Errorf("other = %v, want 98", got)
	}
}

func TestNamesAreGood(t *testing.T) {
	_, text := scrape(t, busy())
	problems, err := promlint.New(bytes.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "kms_agent_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

// Everything that is exposed is in the catalogue, and everything in the
// catalogue is exposed.
func TestCatalogueIsComplete(t *testing.T) {
	f, _ := scrape(t, busy())
	listed := map[string]bool{}
	for _, m := range metrics.Catalogue() {
		listed[m.Name] = true
		if f[m.Name] == nil {
			t.Errorf("%s is in the catalogue and not exposed", m.Name)
		}
	}
	for name := range f {
		if strings.HasPrefix(name, "kms_agent_") && !listed[name] {
			t.Errorf("%s is exposed and not in the catalogue", name)
		}
	}
}

var update = flag.Bool("update", false, "write docs/metrics.md")

// docs/metrics.md has the table that the catalogue makes.
func TestDocumentation(t *testing.T) {
	const path, begin, end = "../../docs/metrics.md", "<!-- catalogue -->\n", "<!-- end -->\n"
	var table strings.Builder
	table.WriteString("| metric | type | labels | meaning |\n|---|---|---|---|\n")
	for _, m := range metrics.Catalogue() {
		labels := "none"
		if len(m.Labels) > 0 {
			labels = "`" + strings.Join(m.Labels, "` `") + "`"
		}
		fmt.Fprintf(&table, "| `%s` | %s | %s | %s |\n", m.Name, m.Kind, labels, m.Help)
	}
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(page), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s lacks the marks of the table", path)
	}
	want := before + begin + table.String() + end + after
	if want == string(page) {
		return
	}
	if !*update {
		t.Fatalf("%s is not what the catalogue makes; run: go test ./agent/metrics -update", path)
	}
	if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkOperation(b *testing.B) {
	m := metrics.New(100, fullStatus)
	r := &audit.Record{
		Kind: audit.KindOperation, Door: "native", Operation: "encrypt", Key: "orders", Outcome: audit.Success,
		Caller: audit.Caller{SPIFFEID: "spiffe://example.org/a"}, Freshness: audit.Freshness{Source: "cached"},
		DurationMicros: 70, BytesIn: 100, BytesOut: 200,
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			m.Operation(r)
		}
	})
}
