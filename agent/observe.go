package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	noopmetric "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
)

// traceFlush is how long the last spans may take to leave when the agent stops,
// exportTimeout how long a batch of them may take before.
const (
	traceFlush    = 2 * time.Second
	exportTimeout = 5 * time.Second
)

// tracing sends spans to a collector. A nil *tracing does nothing.
type tracing struct {
	exporter *otlptrace.Exporter
	provider *sdktrace.TracerProvider
}

// newTracing returns nil when no collector is configured.
func newTracing(cfg TracingConfig, logger *zap.Logger) (*tracing, error) {
	if cfg.Endpoint == "" {
		return nil, nil //nolint:nilnil // no tracing is an ordinary answer
	}
	// It connects when there is something to send, and again when it must.
	exporter, err := otlptracegrpc.New(context.Background(), otlptracegrpc.WithEndpointURL(cfg.Endpoint))
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		logger.Warn("traces are lost", zap.Error(err))
	}))
	return &tracing{exporter, sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter, sdktrace.WithExportTimeout(exportTimeout)),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(float64(cfg.Sample)))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "kms-agent"), attribute.String("service.version", Version()))),
	)}, nil
}

func (t *tracing) close() {
	if t == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), traceFlush)
	defer cancel()
	if t.provider.Shutdown(ctx) != nil { // what it could not send was logged
		// It has left an export behind, which the end of the connection ends.
		_ = t.exporter.Shutdown(context.Background())
	}
}

func (t *tracing) options() []otelgrpc.Option {
	return []otelgrpc.Option{
		otelgrpc.WithTracerProvider(t.provider), otelgrpc.WithPropagators(propagation.TraceContext{}),
		otelgrpc.WithMeterProvider(noopmetric.NewMeterProvider()), // metrics are Prometheus'
	}
}

// serverOptions make a span of each request.
func (t *tracing) serverOptions() []grpc.ServerOption {
	if t == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(t.options()...))}
}

// pluginHandler makes a span of each call to a plugin and hands it the trace.
func (t *tracing) pluginHandler() stats.Handler {
	if t == nil {
		return nil
	}
	return otelgrpc.NewClientHandler(t.options()...)
}

// operationEnded counts an operation and describes it in its span.
func (a *Agent) operationEnded(ctx context.Context, r *audit.Record) {
	a.metrics.Operation(r)
	span := trace.SpanFromContext(ctx)
	if !span.IsRecording() {
		return
	}
	span.SetAttributes(
		attribute.String("kms_agent.request_id", r.RequestID), attribute.String("kms_agent.operation", r.Operation),
		attribute.String("kms_agent.caller", r.Caller.SPIFFEID), attribute.String("kms_agent.outcome", string(r.Outcome)),
	)
	if r.Outcome == audit.Success {
		span.SetAttributes(attribute.String("kms_agent.key", r.Key), attribute.String("kms_agent.key_version", r.KeyVersion),
			attribute.String("kms_agent.freshness", r.Freshness.Source))
		return
	}
	span.SetAttributes(attribute.String("kms_agent.reason", r.Reason))
}

// upstreamCall counts calls to one backend.
func (a *Agent) upstreamCall(backend string) func(host.Call) {
	return func(c host.Call) {
		if !c.Made {
			a.metrics.SparedCall(backend, c.Method, classLabel(c.Err))
			return
		}
		a.metrics.UpstreamCall(backend, c.Method, classLabel(c.Err), c.Caller, c.Took)
	}
}

// classLabel is the name of an error's class; a caller's own end is no fault of
// the backend.
func classLabel(err error) string {
	var classified *plugins.Error
	switch {
	case err == nil:
		return ""
	case errors.Is(err, plugins.ErrBreakerOpen):
		return "breaker-open"
	case errors.Is(err, plugins.ErrThrottled):
		return "throttled"
	case errors.As(err, &classified):
		return strings.ToLower(plugins.ClassOf(err).String())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "caller-left"
	default:
		return "internal"
	}
}

// observed is what the metrics' HTTP server tells: metrics to Prometheus, health
// to those who restart or route around an agent.
func (a *Agent) observed() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", a.metrics.Handler())
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("alive\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		state := a.Status().GetState()
		if state == stateNotServing {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = w.Write([]byte(state + "\n"))
	})
	return mux
}

// openMetrics listens for Prometheus; it returns nil where nobody asked.
func (a *Agent) openMetrics(ctx context.Context) (net.Listener, error) {
	address := a.configuration().Metrics.Address
	if address == "" {
		return nil, nil //nolint:nilnil // no metrics is an ordinary answer
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	bound := l.Addr().String()
	a.metricsAddress.Store(&bound)
	if at, err := netip.ParseAddrPort(address); err != nil || !at.Addr().IsLoopback() {
		a.logger.Warn("metrics can be read from other hosts: they name callers and keys", zap.String("address", address))
	}
	return l, nil
}

// serveMetrics serves until ctx ends.
func (a *Agent) serveMetrics(ctx context.Context, l net.Listener) error {
	complaints, err := zap.NewStdLogAt(a.logger, zap.WarnLevel)
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	server := &http.Server{
		Handler: a.observed(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second,
		WriteTimeout: 15 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: complaints,
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("metrics: %w", err)
	}
	return nil
}
