package agent

import (
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
)

// MetricsConfig says where Prometheus finds the agent's metrics.
type MetricsConfig struct {
	// Address is ip:port; empty: nowhere.
	Address string `yaml:"address"`
	// MaxCallers is how many callers have time series of their own.
	MaxCallers int `yaml:"max_callers"`
}

// TracingConfig says where traces are sent.
type TracingConfig struct {
	// Endpoint is the OTLP/gRPC address of a collector, http://host:port or
	// https://host:port; empty: no traces.
	Endpoint string `yaml:"endpoint"`
	// Sample is the part of the traces that begin here which is recorded. Traces
	// that a caller began are recorded as the caller decided.
	Sample Ratio `yaml:"sample"`
}

// Ratio is a number from 0 to 1.
type Ratio float64

// UnmarshalText reads a decimal number from 0 to 1.
func (r *Ratio) UnmarshalText(text []byte) error {
	n, err := strconv.ParseFloat(string(text), 64)
	if err != nil || !(n >= 0 && n <= 1) {
		return fmt.Errorf("%s is not a number from 0 to 1, such as 0.01", quote(string(text)))
	}
	*r = Ratio(n)
	return nil
}

const maxMetricCallers = 100_000

func (l *loader) validateObservation() {
	m, t := l.cfg.Metrics, l.cfg.Tracing
	if m.Address != "" {
		if _, err := netip.ParseAddrPort(m.Address); err != nil {
			l.report("metrics.address", "%s is not ip:port, such as 127.0.0.1:9464", quote(m.Address))
		}
	}
	between(l, "metrics.max_callers", m.MaxCallers, 1, maxMetricCallers)
	if t.Endpoint == "" {
		return
	}
	u, err := url.Parse(t.Endpoint)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "" || u.User != nil {
		l.report("tracing.endpoint", "%s is no OTLP collector; write http://host:port, such as http://127.0.0.1:4317, or https", quote(t.Endpoint))
	}
}
