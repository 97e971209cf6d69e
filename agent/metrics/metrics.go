// Package metrics counts what an agent does and shows it to Prometheus.
// docs/metrics.md lists the metrics.
package metrics

import (
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/kms-agent/kms-agent/agent/audit"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// Values of labels that stand for more than one thing.
const (
	// other stands for the callers that have no label of their own.
	other = "other"
	// agentItself stands for calls that no caller waits for.
	agentItself = "agent"
	// unknown stands for callers without an identity.
	unknown = "unidentified"
)

// Metrics counts. It is safe for concurrent use.
type Metrics struct {
	registry *prometheus.Registry
	counters map[string]*prometheus.CounterVec
	seconds  map[string]*prometheus.HistogramVec

	maxCallers int
	mu         sync.RWMutex
	callers    map[string]bool     // mu guards callers: those with a label of their own
	series     map[success]*series // mu guards series
}

// New returns Metrics that give at most maxCallers callers a label of their
// own. status is asked at each scrape.
func New(maxCallers int, status func() *adminv1.StatusResponse) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(), counters: map[string]*prometheus.CounterVec{}, seconds: map[string]*prometheus.HistogramVec{},
		maxCallers: maxCallers, callers: map[string]bool{}, series: map[success]*series{},
	}
	for _, d := range eventMetrics() {
		if d.Kind == Histogram {
			m.seconds[d.Name] = prometheus.NewHistogramVec(prometheus.HistogramOpts{
				Name: d.Name, Help: d.Help, Buckets: buckets(),
			}, d.Labels)
			m.registry.MustRegister(m.seconds[d.Name])
			continue
		}
		m.counters[d.Name] = prometheus.NewCounterVec(prometheus.CounterOpts{Name: d.Name, Help: d.Help}, d.Labels)
		m.registry.MustRegister(m.counters[d.Name])
	}
	m.registry.MustRegister(newStatusCollector(status),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// buckets reach from a cached operation (tens of microseconds) to the longest
// deadline.
func buckets() []float64 {
	return []float64{50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30}
}

// Operation counts an operation that ended as its audit record says.
func (m *Metrics) Operation(r *audit.Record) {
	caller := m.caller(r.Caller.SPIFFEID, unknown)
	if r.Outcome == audit.Success {
		m.succeeded(seriesOf(r, caller)).add(r)
		return
	}
	// The key is what the caller named, which need not exist.
	m.counters[requests].WithLabelValues(r.Door, r.Operation, string(r.Outcome), r.Reason).Inc()
	m.counters[callerRequests].WithLabelValues(caller, r.Operation).Inc()
}

// success has the labels of a successful operation.
type success struct {
	door, operation, caller, key, freshness string
}

func seriesOf(r *audit.Record, caller string) success {
	return success{r.Door, r.Operation, caller, r.Key, r.Freshness.Source}
}

// series are the time series that a successful operation adds to; looking each
// of them up for every operation would cost more than adding to all.
type series struct {
	requests, callerRequests  prometheus.Counter
	callerIn, callerOut       prometheus.Counter
	keyIn, keyOut, keyAnswers prometheus.Counter // nil without a key
	seconds                   prometheus.Observer
}

func (m *Metrics) succeeded(labels success) *series {
	m.mu.RLock()
	s := m.series[labels]
	m.mu.RUnlock()
	if s != nil {
		return s
	}
	s = &series{
		requests:       m.counters[requests].WithLabelValues(labels.door, labels.operation, string(audit.Success), ""),
		callerRequests: m.counters[callerRequests].WithLabelValues(labels.caller, labels.operation),
		callerIn:       m.counters[callerBytes].WithLabelValues(labels.caller, "in"),
		callerOut:      m.counters[callerBytes].WithLabelValues(labels.caller, "out"),
		seconds:        m.seconds[requestSeconds].WithLabelValues(labels.door, labels.operation),
	}
	if labels.key != "" {
		s.keyIn = m.counters[keyBytes].WithLabelValues(labels.key, "in")
		s.keyOut = m.counters[keyBytes].WithLabelValues(labels.key, "out")
	}
	if labels.key != "" && labels.freshness != "" {
		s.keyAnswers = m.counters[answers].WithLabelValues(labels.key, labels.operation, labels.freshness)
	}
	m.mu.Lock()
	m.series[labels] = s
	m.mu.Unlock()
	return s
}

func (s *series) add(r *audit.Record) {
	s.requests.Inc()
	s.callerRequests.Inc()
	s.callerIn.Add(float64(r.BytesIn))
	s.callerOut.Add(float64(r.BytesOut))
	if r.Kind == audit.KindOperation {
		s.seconds.Observe(time.Duration(r.DurationMicros * 1000).Seconds())
	}
	if s.keyIn != nil {
		s.keyIn.Add(float64(r.BytesIn))
		s.keyOut.Add(float64(r.BytesOut))
	}
	if s.keyAnswers != nil {
		s.keyAnswers.Inc()
	}
}

// UpstreamCall counts a call ("wrap", "unwrap", ...) to a backend that ended
// with an error class, "" for success. caller is who it was made for, "" for
// nobody.
func (m *Metrics) UpstreamCall(backend, call, class, caller string, took time.Duration) {
	if class == "" {
		class = "ok"
		m.seconds[upstreamSeconds].WithLabelValues(backend, call).Observe(took.Seconds())
	}
	m.counters[upstreamCalls].WithLabelValues(backend, call, class).Inc()
	m.counters[callerUpstream].WithLabelValues(m.caller(caller, agentItself), backend).Inc()
}

// SparedCall counts a call that was not made to a backend, so that nobody is
// charged for it; class says why.
func (m *Metrics) SparedCall(backend, call, class string) {
	m.counters[upstreamCalls].WithLabelValues(backend, call, class).Inc()
}

// RefusedConnection counts a connection that was closed before its caller was
// known: cause is "handshake".
func (m *Metrics) RefusedConnection(door, cause string) {
	m.counters[refusedConnection].WithLabelValues(door, cause).Inc()
}

// caller returns the label for a caller. A flood of callers must not become a
// flood of time series.
func (m *Metrics) caller(id, none string) string {
	if id == "" {
		return none
	}
	m.mu.RLock()
	known, full := m.callers[id], len(m.callers) >= m.maxCallers
	m.mu.RUnlock()
	switch {
	case known:
		return id
	case full:
		return other
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.callers) < m.maxCallers {
		m.callers[id] = true
	}
	if m.callers[id] {
		return id
	}
	return other
}

// Handler shows the metrics in Prometheus' text formats.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second})
}
