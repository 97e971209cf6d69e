package identity

import (
	"crypto/tls"
	"errors"
	"strings"
	"testing"
	"time"
)

// No client can resume a session, since none is given a ticket. Should one
// manage to, it is refused all the same.
func TestAdmitRefusesAResumedSession(t *testing.T) {
	source, err := NewSource(SourceConfig{Address: "unix:///api.sock"})
	if err != nil {
		t.Fatal(err)
	}
	v := x509Verifier{source: source, now: time.Now}
	err = v.admit(&Conn{}, tls.ConnectionState{DidResume: true, NegotiatedProtocol: "h2"})
	if !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), "resumed") {
		t.Fatalf("got %v, want a refusal that speaks of the resumed session", err)
	}
}
