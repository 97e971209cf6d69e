package client

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

const (
	// DefaultSocket is where an agent listens unless it is configured otherwise.
	DefaultSocket = "/run/kms-agent/kms.sock"
	// DefaultWait bounds the wait for the first SVID where Options does not say.
	DefaultWait = 10 * time.Second
	// DefaultRetry bounds the retries of a call where Options does not say: longer
	// than an agent needs to be restarted.
	DefaultRetry = 5 * time.Second
)

// Options say where the agent is and how to prove oneself to it. The zero value
// is a plaintext connection to DefaultSocket.
type Options struct {
	// Socket is the absolute path of the agent's native socket, or its address as
	// unix:///path. Empty means DefaultSocket.
	Socket string

	// WorkloadAPI is the address of the SPIFFE Workload API (unix:///path or
	// tcp://ip:port) that gives this process its X.509-SVID. Empty, and without a
	// Source: the connection is plaintext, and the agent takes the process for
	// the static peer that it is configured as, if any; the agent is then not
	// proven to the client, beyond that it may listen at Socket.
	WorkloadAPI string
	// Source is used instead of WorkloadAPI, and stays the caller's to close.
	Source *workloadapi.X509Source
	// AgentID decides whether the server is the agent; nil takes every member of
	// the caller's own trust domain, spiffeid.MatchID exactly one. Without an
	// X.509-SVID it must be nil: nothing could be matched.
	AgentID spiffeid.Matcher
	// JWTAudience makes the process prove itself by JWT-SVIDs for this audience,
	// which WorkloadAPI gives, instead of an X.509-SVID: the agent's SPIFFE ID, or
	// what the agent is configured to take (identity.jwt_audience). The connection
	// is plaintext, and the agent not proven: whoever listens at Socket gets
	// tokens that it can use itself until they end.
	JWTAudience string
	// Wait bounds the wait for the first SVID within Dial; 0 means DefaultWait.
	Wait time.Duration

	// Retry bounds how long one call is repeated while the agent cannot be reached
	// or says itself that it will soon be able to answer; the call's context bounds
	// it too. Every operation may be repeated without harm. A stream waits for the
	// connection this long and is never repeated. 0 means DefaultRetry, less than
	// 0 no retries.
	Retry time.Duration
}

// FromEnvironment returns the options that the environment of the process gives:
// Socket from KMS_AGENT_SOCKET and WorkloadAPI from SPIFFE_ENDPOINT_SOCKET, each
// empty where it is not set.
func FromEnvironment() Options {
	return Options{Socket: os.Getenv("KMS_AGENT_SOCKET"), WorkloadAPI: os.Getenv("SPIFFE_ENDPOINT_SOCKET")}
}

// path is the agent's socket as a path.
func (o Options) path() string {
	path, isAddress := strings.CutPrefix(o.Socket, "unix:")
	if isAddress {
		path = strings.TrimPrefix(path, "//")
	}
	return cmp.Or(path, DefaultSocket)
}

func (o Options) check() error {
	switch {
	case !filepath.IsAbs(o.path()):
		return fmt.Errorf("%q is no absolute path of a socket", o.Socket)
	case o.WorkloadAPI != "" && o.Source != nil:
		return errors.New("give a Workload API address or a source, not both")
	case o.JWTAudience != "" && (o.WorkloadAPI == "" || o.Source != nil):
		return errors.New("JWT-SVIDs come from the Workload API; give its address, and no source")
	case (o.WorkloadAPI == "" && o.Source == nil || o.JWTAudience != "") && o.AgentID != nil:
		return errors.New("the agent's SPIFFE ID cannot be checked on a plaintext connection; use an X.509-SVID")
	}
	return nil
}
