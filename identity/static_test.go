package identity_test

import (
	"context"
	"encoding/asn1"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/identity"
)

type (
	asn1OID = asn1.ObjectIdentifier
	wUpdate = workload.X509SVIDResponse
)

func uid() uint32 { return uint32(os.Getuid()) }
func gid() uint32 { return uint32(os.Getgid()) }

func TestStaticPeers(t *testing.T) {
	cases := map[string]struct {
		rules []identity.StaticPeer
		want  spiffeid.ID
	}{
		"none":               {nil, spiffeid.ID{}},
		"uid":                {[]identity.StaticPeer{{UID: number(uid()), ID: orders}}, orders},
		"gid":                {[]identity.StaticPeer{{GID: number(gid()), ID: orders}}, orders},
		"both":               {[]identity.StaticPeer{{UID: number(uid()), GID: number(gid()), ID: orders}}, orders},
		"other uid":          {[]identity.StaticPeer{{UID: number(uid() + 1), ID: orders}}, spiffeid.ID{}},
		"other gid":          {[]identity.StaticPeer{{GID: number(gid() + 1), ID: orders}}, spiffeid.ID{}},
		"uid but not gid":    {[]identity.StaticPeer{{UID: number(uid()), GID: number(gid() + 1), ID: orders}}, spiffeid.ID{}},
		"gid but not uid":    {[]identity.StaticPeer{{UID: number(uid() + 1), GID: number(gid()), ID: orders}}, spiffeid.ID{}},
		"first match":        {[]identity.StaticPeer{{UID: number(uid()), ID: billing}, {GID: number(gid()), ID: orders}}, billing},
		"first that matches": {[]identity.StaticPeer{{UID: number(uid() + 1), ID: billing}, {GID: number(gid()), ID: orders}}, orders},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			a := startAgent(t, identity.Config{TrustDomain: domain, StaticPeers: c.rules})
			conn := a.dial(t, nil)
			if c.want.IsZero() {
				a.wantUnauthenticated(t, conn, identity.ErrUnidentified, "no static peer is configured for uid")
				return
			}
			wantCaller(t, conn, c.want, identity.ProofStaticPeer)
		})
	}
}

func TestStaticPeersChangeOnALiveConnection(t *testing.T) {
	a := startAgent(t, identity.Config{TrustDomain: domain, StaticPeers: []identity.StaticPeer{{UID: number(uid()), ID: orders}}})
	conn := a.dial(t, nil)
	set := func(rules ...identity.StaticPeer) {
		t.Helper()
		if err := a.creds.SetStaticPeers(rules); err != nil {
			t.Fatal(err)
		}
	}
	wantCaller(t, conn, orders, identity.ProofStaticPeer)
	set()
	a.wantUnauthenticated(t, conn, identity.ErrUnidentified, "no static peer")
	set(identity.StaticPeer{UID: number(uid()), ID: billing})
	wantCaller(t, conn, billing, identity.ProofStaticPeer)
	if err := a.creds.SetStaticPeers([]identity.StaticPeer{{ID: orders}}); err == nil {
		t.Fatal("a rule without uid and gid was taken")
	}
	wantCaller(t, conn, billing, identity.ProofStaticPeer)
}

func TestStaticPeerFaults(t *testing.T) {
	_, err := identity.NewCredentials(identity.Config{TrustDomain: domain, StaticPeers: []identity.StaticPeer{
		{ID: orders},
		{UID: number(uint32(1))},
		{UID: number(uint32(1)), ID: domain.ID()},
		{UID: number(uint32(1)), ID: spiffeid.RequireFromString("spiffe://other.org/x")},
		{UID: number(uint32(1)), ID: orders},
	}})
	if err == nil {
		t.Fatal("faulty rules were taken")
	}
	for _, want := range []string{
		"static peer 1: matches every process", "static peer 2: has no SPIFFE ID",
		"static peer 3: spiffe://example.org names a trust domain", "static peer 4: spiffe://other.org/x is not of",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), "static peer 5") {
		t.Errorf("the good rule is blamed: %v", err)
	}
}

func TestCallerFromForeignContext(t *testing.T) {
	if _, err := identity.CallerFromContext(context.Background()); !errors.Is(err, identity.ErrUnidentified) {
		t.Fatalf("got %v, want ErrUnidentified", err)
	}
	if peer, ok := identity.PeerFromContext(context.Background()); ok {
		t.Fatalf("found peer %+v in an empty context", peer)
	}
}

func TestHandshakeDeadline(t *testing.T) {
	w := newWorld(t, func(c *identity.Config) { c.HandshakeTimeout = 50 * time.Millisecond })
	for name, said := range map[string]string{
		"nothing":              "",
		"one byte of TLS":      "\x16",
		"a record's beginning": "\x16\x03\x01\x02\x00\x01\x00",
		"one byte of HTTP/2":   "P",
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("unix", w.agent.path)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Write([]byte(said)); err != nil {
				t.Fatal(err)
			}
			for err == nil {
				_, err = conn.Read(make([]byte, 64))
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("the agent waits for this client without end")
			}
		})
	}
}

func TestOtherThanUnixSocketIsRefused(t *testing.T) {
	creds, err := identity.NewCredentials(identity.Config{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	if _, _, err := creds.ServerHandshake(server); err == nil || !strings.Contains(err.Error(), "Unix socket") {
		t.Fatalf("got %v, want a refusal that names the Unix socket", err)
	}
	pipe, other := net.Pipe()
	defer func() { _, _ = pipe.Close(), other.Close() }()
	if _, _, err := creds.ServerHandshake(pipe); err == nil || !strings.Contains(err.Error(), "NetConn") {
		t.Fatalf("got %v, want a refusal that names NetConn", err)
	}
}
