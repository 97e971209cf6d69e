package agent

import (
	"fmt"
	"time"

	"github.com/kms-agent/kms-agent/agent/audit"
)

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
	// OnFailure says what becomes of an operation that cannot be recorded.
	OnFailure OnFailure `yaml:"on_failure"`
	// CoalesceDenials is how long equal denials are counted before a record says
	// how many; 0 writes each.
	CoalesceDenials time.Duration `yaml:"coalesce_denials"`
	// Rotate sets log files aside, those of the sinks too.
	Rotate RotateConfig `yaml:"rotate"`
	// Sinks get the records too.
	Sinks []AuditSinkConfig `yaml:"sinks"`
	// Checkpoints leave the host, to prove how far the log had come.
	Checkpoints CheckpointConfig `yaml:"checkpoints"`
}

// AuditSinkConfig is one more place for the records: a file or a syslog socket.
type AuditSinkConfig struct {
	// File is a path, or audit.Stdout.
	File string `yaml:"file"`
	// Syslog is the path of a syslog daemon's Unix socket.
	Syslog string      `yaml:"syslog"`
	Format AuditFormat `yaml:"format"`
	// Required: no record there, no answer.
	Required bool `yaml:"required"`
}

func (s *AuditSinkConfig) setDefaults() { s.Format = AuditJSON }

// CheckpointConfig says where checkpoints go: a file or a syslog socket; neither
// is nowhere.
type CheckpointConfig struct {
	File   string        `yaml:"file"`
	Syslog string        `yaml:"syslog"`
	Every  time.Duration `yaml:"every"`
}

// AuditFormat is how the records of a sink look.
type AuditFormat string

// The lines of the log itself (the default), or events of the Open
// Cybersecurity Schema Framework.
const (
	AuditJSON AuditFormat = "json"
	AuditOCSF AuditFormat = "ocsf"
)

// UnmarshalText refuses any other word.
func (f *AuditFormat) UnmarshalText(text []byte) error {
	return oneOf(f, string(text), AuditJSON, AuditOCSF)
}

// OnFailure says what becomes of an operation that cannot be recorded.
type OnFailure string

// No answer (the default), or an answer that nobody can prove.
const (
	OnFailureRefuse OnFailure = "refuse"
	OnFailureAnswer OnFailure = "answer"
)

// UnmarshalText refuses any other word.
func (o *OnFailure) UnmarshalText(text []byte) error {
	return oneOf(o, string(text), OnFailureRefuse, OnFailureAnswer)
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
	c.OnFailure = OnFailureRefuse
	c.CoalesceDenials = 10 * time.Second
	c.Checkpoints.Every = time.Minute
	c.Rotate = RotateConfig{MaxSize: 128 << 20, MaxAge: 24 * time.Hour, Retention: 90 * 24 * time.Hour}
}

// Bounds of rotation: a file holds many records, so that files are few; and a
// retention in the wrong unit must not delete a log.
const (
	minRotateSize = 1 << 20
	maxRotateSize = 1 << 40
	minRotateAge  = time.Minute
	minRetention  = time.Hour

	minCheckpointEvery = time.Second
	maxCoalesceDenials = time.Hour
	maxAuditSinks      = 8
)

// auditPaths are the paths of the audit section that are relative to the file.
func (l *loader) auditPaths() []*string {
	c := &l.cfg.Audit
	paths := []*string{&c.InitialKey, &c.Checkpoints.Syslog}
	files := []*string{&c.File, &c.Checkpoints.File}
	for i := range c.Sinks {
		paths, files = append(paths, &c.Sinks[i].Syslog), append(files, &c.Sinks[i].File)
	}
	for _, file := range files {
		if *file != audit.Stdout {
			paths = append(paths, file)
		}
	}
	return paths
}

func (l *loader) validateAudit() {
	c := l.cfg.Audit
	l.required("audit.file", c.File, "the audit log's path, such as /var/log/kms-agent/audit.log")
	l.required("audit.initial_key", c.InitialKey, "the path of the chain's first key, such as /var/lib/kms-agent/audit.key")
	if c.File != "" && c.File == c.InitialKey {
		l.report("audit.initial_key", "is the audit log too; each needs its own file")
	}
	l.positive("audit.write_timeout", c.WriteTimeout)
	if c.CoalesceDenials < 0 || c.CoalesceDenials > maxCoalesceDenials {
		l.report("audit.coalesce_denials", "is %v; write 1h or less, or 0s to write each denial", c.CoalesceDenials)
	}
	l.validateSinks()
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

// validateSinks makes sure that each place is one, and only one.
func (l *loader) validateSinks() {
	c := l.cfg.Audit
	if len(c.Sinks) > maxAuditSinks {
		l.report("audit.sinks", "are %d; %d are the most", len(c.Sinks), maxAuditSinks)
	}
	used := map[string]string{c.File: "audit.file", c.InitialKey: "audit.initial_key"}
	for i, s := range c.Sinks {
		path := fmt.Sprintf("audit.sinks[%d]", i)
		if (s.File == "") == (s.Syslog == "") {
			l.report(path, "needs file or syslog, and not both")
		}
		l.unused(used, path+".file", s.File)
	}
	p := c.Checkpoints
	if p.File != "" && p.Syslog != "" {
		l.report("audit.checkpoints", "go to file or syslog, not both")
	}
	l.unused(used, "audit.checkpoints.file", p.File)
	if p.Every < minCheckpointEvery {
		l.report("audit.checkpoints.every", "is %v; write %v or more", p.Every, minCheckpointEvery)
	}
}

// unused reports a file that something else is.
func (l *loader) unused(used map[string]string, path, file string) {
	if file == "" {
		return
	}
	if by, taken := used[file]; taken {
		l.report(path, "is %s too; each needs its own file", by)
	}
	used[file] = path
}

// AuditLog is what the configuration asks of the audit log.
func (c *Config) AuditLog() audit.Config {
	a := c.Audit
	log := audit.Config{
		Path: a.File, StateDir: c.StateDir, InitialKeyPath: a.InitialKey,
		Durable: a.Durable, WriteTimeout: a.WriteTimeout, ContextValues: audit.ContextValues(a.ContextValues),
		OnFailure: audit.OnFailure(a.OnFailure), CoalesceDenials: a.CoalesceDenials, Version: Version(),
		Rotation: audit.Rotation{
			MaxSize: int64(a.Rotate.MaxSize), MaxAge: a.Rotate.MaxAge, Retention: a.Rotate.Retention,
		},
		Checkpoints:     audit.SinkConfig{File: a.Checkpoints.File, Syslog: a.Checkpoints.Syslog},
		CheckpointEvery: a.Checkpoints.Every,
	}
	for _, s := range a.Sinks {
		log.Sinks = append(log.Sinks, audit.SinkConfig{
			File: s.File, Syslog: s.Syslog, Format: audit.Format(s.Format), Required: s.Required,
		})
	}
	return log
}
