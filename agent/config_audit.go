package agent

import "time"

// AuditConfig describes the audit log.
type AuditConfig struct {
	// File is the log, or audit.Stdout.
	File string `yaml:"file"`
	// InitialKey is the file with the first key of the HMAC chain; made where
	// it is missing.
	InitialKey string `yaml:"initial_key"`
	// Durable waits for the disk before an answer goes out.
	Durable       bool          `yaml:"durable"`
	ContextValues ContextValues `yaml:"context_values"`
	WriteTimeout  time.Duration `yaml:"write_timeout"`
	// Rotate sets log files aside.
	Rotate RotateConfig `yaml:"rotate"`
}

// RotateConfig says when log files are set aside and deleted; 0 is never.
type RotateConfig struct {
	MaxSize   Size          `yaml:"max_size"`
	MaxAge    time.Duration `yaml:"max_age"`
	Retention time.Duration `yaml:"retention"`
}

func (c *AuditConfig) setDefaults() {
	c.ContextValues = ContextKeys
	c.WriteTimeout = 2 * time.Second
	c.Rotate = RotateConfig{MaxSize: 128 << 20, MaxAge: 24 * time.Hour, Retention: 90 * 24 * time.Hour}
}

// Bounds of rotation: a file holds many records, so that files are few; and a
// retention in the wrong unit must not delete a log.
const (
	minRotateSize = 1 << 20
	maxRotateSize = 1 << 40
	minRotateAge  = time.Minute
	minRetention  = time.Hour
)

func (l *loader) validateAudit() {
	c := l.cfg.Audit
	l.required("audit.file", c.File, "the audit log's path, such as /var/log/kms-agent/audit.log")
	l.required("audit.initial_key", c.InitialKey, "the path of the chain's first key, such as /var/lib/kms-agent/audit.key")
	if c.File != "" && c.File == c.InitialKey {
		l.report("audit.initial_key", "is the audit log too; each needs its own file")
	}
	l.positive("audit.write_timeout", c.WriteTimeout)
	if c.Rotate.MaxSize != 0 {
		between(l, "audit.rotate.max_size", c.Rotate.MaxSize, minRotateSize, maxRotateSize)
	}
	for _, d := range []struct {
		path       string
		value, min time.Duration
	}{
		{"audit.rotate.max_age", c.Rotate.MaxAge, minRotateAge},
		{"audit.rotate.retention", c.Rotate.Retention, minRetention},
	} {
		if d.value != 0 && d.value < d.min {
			l.report(d.path, "is %v; write %v or more, or 0s for never", d.value, d.min)
		}
	}
}
