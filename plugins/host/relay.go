package host

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"sync"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/time/rate"

	"github.com/kms-agent/kms-agent/plugins"
)

// What a plugin may log.
const (
	maxLine       = 8 << 10 // bytes of a line; the rest is dropped
	maxText       = 2 << 10 // bytes of a message or of a field
	maxFields     = 32
	linesPerSec   = 100
	linesAtOnce   = 500
	maxNameInLogs = 64
)

// relay logs what a plugin writes, line by line. It trusts none of it: lines
// are bounded in length and rate, and their parts made printable. It is safe
// for concurrent use and never fails.
type relay struct {
	logger *zap.Logger
	stream string
	most   zapcore.Level // lines are logged at this level at most

	mu      sync.Mutex
	limit   *rate.Limiter // mu guards limit and what follows
	line    []byte
	cut     bool // the line is longer than maxLine
	dropped int  // lines over the limit since the last that was logged
	closed  bool // nothing is logged any more
}

func newRelay(logger *zap.Logger, stream string, most zapcore.Level) *relay {
	return &relay{logger: logger, stream: stream, most: most, limit: rate.NewLimiter(linesPerSec, linesAtOnce)}
}

// Write implements io.Writer.
func (r *relay) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return len(p), nil
	}
	for rest := p; len(rest) > 0; {
		part, after, ended := bytes.Cut(rest, []byte("\n"))
		rest = after
		room := maxLine - len(r.line)
		r.cut = r.cut || len(part) > room
		r.line = append(r.line, part[:min(len(part), room)]...)
		if ended {
			r.flush()
		}
	}
	return len(p), nil
}

// Close logs what came after the last line's end. What is written later, by
// goroutines of go-plugin that nobody can wait for, is dropped.
func (r *relay) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.flush()
	r.closed = true
	if r.dropped > 0 {
		r.logger.Warn("plugin logged too much", zap.Int("lines_dropped", r.dropped))
	}
	return nil
}

func (r *relay) flush() {
	line, cut := bytes.TrimSpace(r.line), r.cut
	r.line, r.cut = r.line[:0], false
	if len(line) == 0 {
		return
	}
	if !r.limit.Allow() {
		r.dropped++
		return
	}
	level, fields := parseLine(line)
	fields = append(fields, zap.String("stream", r.stream))
	if cut {
		fields = append(fields, zap.Bool("cut", true))
	}
	if r.dropped > 0 {
		fields = append(fields, zap.Int("lines_dropped", r.dropped))
		r.dropped = 0
	}
	r.logger.Log(min(level, r.most), "plugin log", fields...)
}

// parseLine returns the level of a line and its text and fields. What is not a
// JSON object as hclog or zap write it is text.
func parseLine(line []byte) (zapcore.Level, []zap.Field) {
	var object map[string]any
	if line[0] != '{' || json.Unmarshal(line, &object) != nil {
		return zapcore.WarnLevel, []zap.Field{zap.String("text", plugins.Printable(string(line), maxText))}
	}
	level := levelOf(take(object, "@level", "level"))
	text := take(object, "@message", "msg", "message")
	for _, key := range []string{"@timestamp", "ts", "timestamp"} {
		delete(object, key)
	}
	fields := []zap.Field{zap.String("text", plugins.Printable(text, maxText))}
	for i, key := range slices.Sorted(maps.Keys(object)) {
		if i == maxFields {
			break
		}
		// A name of its own: a plugin's field never passes for one of ours.
		fields = append(fields, zap.String("plugin."+plugins.Printable(key, maxNameInLogs), valueText(object[key])))
	}
	return level, fields
}

// take removes the first of the keys that holds a string and returns it.
func take(object map[string]any, keys ...string) string {
	for _, key := range keys {
		if text, ok := object[key].(string); ok {
			delete(object, key)
			return text
		}
	}
	return ""
}

func valueText(value any) string {
	if text, ok := value.(string); ok {
		return plugins.Printable(text, maxText)
	}
	encoded, err := json.Marshal(value)
	if err != nil {
		return ""
	}
	return plugins.Printable(string(encoded), maxText)
}

func levelOf(name string) zapcore.Level {
	switch strings.ToLower(name) {
	case "trace", "debug":
		return zapcore.DebugLevel
	case "warn", "warning":
		return zapcore.WarnLevel
	case "error", "dpanic", "panic", "fatal", "critical":
		return zapcore.ErrorLevel
	default:
		return zapcore.InfoLevel
	}
}
