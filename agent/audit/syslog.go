package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// syslogSink sends lines to a syslog daemon of this host over a Unix socket: one
// datagram per line or, where the socket is a stream, lines as they are. It
// connects when it must, and again when the daemon has gone.
type syslogSink struct {
	path    string
	timeout time.Duration
	conn    net.Conn // nil: not connected
	stream  bool
}

// syslogCut is what is left of a line that the socket does not take whole, in
// bytes: what RFC 5424, section 6.1, says that every receiver should take.
const syslogCut = 2048

// Write sends lines. Only whole lines count as taken.
func (s *syslogSink) Write(p []byte) (int, error) {
	taken := 0
	for taken < len(p) {
		end := bytes.IndexByte(p[taken:], '\n')
		if end < 0 {
			return taken, errors.New("syslog: a line without an end")
		}
		if err := s.send(p[taken : taken+end+1]); err != nil {
			return taken, err
		}
		taken += end + 1
	}
	return taken, nil
}

// send sends one line, over a new connection when the old one does not work.
func (s *syslogSink) send(line []byte) error {
	fresh := s.conn == nil
	if err := s.connect(); err != nil {
		return err
	}
	err := s.put(line)
	if err == nil || isTimeout(err) && !s.stream {
		return err // a datagram that timed out is gone or not at all
	}
	s.disconnect()
	if fresh || isTimeout(err) {
		return err
	}
	if err := s.connect(); err != nil {
		return err
	}
	if err := s.put(line); err != nil {
		s.disconnect()
		return err
	}
	return nil
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func (s *syslogSink) put(line []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(s.timeout)); err != nil {
		return fmt.Errorf("syslog %s: %w", s.path, err)
	}
	if !s.stream {
		line = line[:len(line)-1]
	}
	_, err := s.conn.Write(line)
	if errors.Is(err, unix.EMSGSIZE) && len(line) > syslogCut {
		_, err = s.conn.Write(cutText(line, syslogCut))
	}
	if err != nil {
		return fmt.Errorf("syslog %s: %w", s.path, err)
	}
	return nil
}

// cutText cuts text to at most n bytes, between characters.
func cutText(text []byte, n int) []byte {
	for n > 0 && n < len(text) && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:min(n, len(text))]
}

func (s *syslogSink) connect() error {
	if s.conn != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.timeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixgram", s.path)
	s.stream = false
	if errors.Is(err, unix.EPROTOTYPE) {
		conn, err = d.DialContext(ctx, "unix", s.path)
		s.stream = true
	}
	if err != nil {
		return fmt.Errorf("syslog: %w", err)
	}
	s.conn = conn
	return nil
}

func (s *syslogSink) disconnect() {
	if s.conn != nil {
		_ = s.conn.Close() // it does not work any more
		s.conn = nil
	}
}

// Sync does nothing: what the daemon does with a line is its own.
func (s *syslogSink) Sync() error { return nil }

func (s *syslogSink) Close() error {
	s.disconnect()
	return nil
}

func (s *syslogSink) String() string { return "syslog " + s.path }

// The parts of PRI (RFC 5424, section 6.2.1).
const (
	syslogAudit = 13 // facility "log audit"

	syslogError   = 3
	syslogWarning = 4
	syslogNotice  = 5
	syslogInfo    = 6

	// maxSequenceID is the largest meta sequenceId (section 7.3.1).
	maxSequenceID = 1<<31 - 1
	// syslogElement is the SD-ID of our own structured data. The number is the
	// one that IANA keeps for documentation: the project has none of its own.
	syslogElement = "kms-agent@32473"
)

// appendSyslog appends the header and the structured data of a message (RFC
// 5424) about r, and a space.
func (p *producer) appendSyslog(b []byte, r *Record, sequence uint64) []byte {
	b = append(b, '<')
	b = strconv.AppendInt(b, int64(syslogAudit*8+syslogSeverity(r)), 10)
	b = append(b, ">1 "...)
	b = r.Time.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z07:00")
	b = appendSyslogName(append(b, ' '), p.host, 255)
	b = append(b, " kms-agent "...)
	b = strconv.AppendInt(b, int64(p.pid), 10)
	b = appendSyslogName(append(b, ' '), string(r.Kind), 32)
	b = append(b, ` [meta sequenceId="`...)
	b = strconv.AppendUint(b, (sequence-1)%maxSequenceID+1, 10)
	b = append(b, `"][`+syslogElement...)
	b = appendParam(b, "chain", p.chain)
	b = appendParam(b, "sequence", strconv.FormatUint(sequence, 10))
	b = appendParam(b, "request_id", r.RequestID)
	b = appendParam(b, "caller", r.Caller.SPIFFEID)
	b = appendParam(b, "operation", r.Operation)
	b = appendParam(b, "key", r.Key)
	b = appendParam(b, "outcome", string(r.Outcome))
	b = appendParam(b, "reason", r.Reason)
	return append(b, "] "...)
}

func syslogSeverity(r *Record) int {
	switch {
	case r.Outcome == Denied:
		return syslogWarning
	case r.Outcome == Error:
		return syslogError
	case r.Kind == KindEvent:
		return syslogNotice
	}
	return syslogInfo
}

// appendSyslogName appends a header field: printable ASCII, at most n bytes, "-"
// for none.
func appendSyslogName(b []byte, name string, n int) []byte {
	name = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return '_'
		}
		return r
	}, name)
	if name == "" {
		name = "-"
	}
	return append(b, name[:min(n, len(name))]...)
}

// appendParam appends a parameter of structured data; section 6.3.3 says which
// characters are escaped. Control characters, which it leaves to the receiver,
// become spaces, so that a message is one line.
func appendParam(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	b = append(append(append(b, ' '), name...), '=', '"')
	for _, r := range value {
		switch {
		case r == '"' || r == '\\' || r == ']':
			b = append(b, '\\', byte(r))
		case r < ' ' || r == 0x7f:
			b = append(b, ' ')
		default:
			b = utf8.AppendRune(b, r)
		}
	}
	return append(b, '"')
}
