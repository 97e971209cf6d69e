// Package issuer is a SPIFFE Workload API for development: an issuer of SVIDs
// that lives in one process and needs nothing installed.
//
// NOT FOR PRODUCTION. Its signing keys are made at start, live in this process's
// memory, and die with it. It gives identities by the uid of a process, or by
// the socket it reached, and attests nothing else. Use SPIRE, or another real
// implementation, wherever the identities are to mean something.
package issuer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/kms-agent/kms-agent/identity"
)

// What an issuer does where Config does not say.
const (
	DefaultTTL    = time.Hour
	DefaultJWTTTL = 5 * time.Minute
)

// Bounds of one server.
const (
	maxRequest        = 64 << 10
	maxHeaders        = 16 << 10
	maxStreams        = 100
	connectionTimeout = 5 * time.Second
)

// Config describes an issuer. At least one socket is needed.
type Config struct {
	// TrustDomain of every identity that is given.
	TrustDomain spiffeid.TrustDomain
	// Socket is the absolute path of the Workload API. Its directory is made,
	// with mode 0700, where it is missing, and must be of mode 0700 and ours
	// where it is not. Needs IDFor.
	Socket string
	// IDFor says which SPIFFE ID a process has; false: none. It is asked again
	// whenever an SVID is due, and must be safe for concurrent use.
	IDFor func(identity.Peer) (spiffeid.ID, bool)
	// Sockets are further Workload APIs, by path: whoever of this user reaches
	// one has its ID. So that processes of one user can be told apart.
	Sockets map[string]spiffeid.ID
	// TTL of an X.509-SVID; renewed at its half. 0 means DefaultTTL. Certificates
	// count whole seconds: an SVID ends at the first full second after its TTL.
	TTL time.Duration
	// JWTTTL of a JWT-SVID; 0 means DefaultJWTTTL. Whole seconds here too.
	JWTTTL time.Duration
}

// minTTL keeps the rotation of SVIDs from becoming a busy loop.
const minTTL = 10 * time.Millisecond

// Issuer is a Workload API with its own authority.
type Issuer struct {
	cfg       Config
	authority *authority
	listeners []net.Listener
	servers   []*grpc.Server
}

// endpoint is one socket and who is behind it.
type endpoint struct {
	path  string
	idFor func(identity.Peer) (spiffeid.ID, bool)
}

// New checks cfg, makes the issuer's keys and its sockets. Who connects before
// Run waits for it. It fails when a socket is in use.
//
// An issuer that is not run must be closed.
func New(cfg Config) (*Issuer, error) {
	cfg.TTL = cmp.Or(cfg.TTL, DefaultTTL)
	cfg.JWTTTL = cmp.Or(cfg.JWTTTL, DefaultJWTTTL)
	i := &Issuer{cfg: cfg}
	endpoints, err := cfg.endpoints()
	if err == nil {
		i.authority, err = newAuthority(cfg.TrustDomain, time.Now())
	}
	if err == nil {
		err = i.listen(endpoints)
	}
	if err != nil {
		return nil, fmt.Errorf("development issuer: %w", errors.Join(err, i.Close()))
	}
	return i, nil
}

func (cfg Config) endpoints() ([]endpoint, error) {
	switch {
	case cfg.TrustDomain.IsZero():
		return nil, errors.New("it needs a trust domain")
	case cfg.TTL < minTTL || cfg.JWTTTL < minTTL:
		return nil, fmt.Errorf("a lifetime is %v at least", minTTL)
	case cfg.Socket == "" && len(cfg.Sockets) == 0:
		return nil, errors.New("it needs a socket")
	case (cfg.Socket == "") != (cfg.IDFor == nil):
		return nil, errors.New("a socket and the function that knows the identities behind it belong together")
	}
	var endpoints []endpoint
	if cfg.Socket != "" {
		endpoints = append(endpoints, endpoint{path: cfg.Socket, idFor: cfg.IDFor})
	}
	for path, id := range cfg.Sockets {
		if path == cfg.Socket {
			return nil, fmt.Errorf("socket %s is given twice", path)
		}
		if err := checkID(id, cfg.TrustDomain); err != nil {
			return nil, fmt.Errorf("socket %s: %w", path, err)
		}
		endpoints = append(endpoints, endpoint{path: path, idFor: func(identity.Peer) (spiffeid.ID, bool) { return id, true }})
	}
	return endpoints, nil
}

// Address returns the address of Config.Socket, as SPIFFE_ENDPOINT_SOCKET wants
// it; empty without one.
func (i *Issuer) Address() string {
	if i.cfg.Socket == "" {
		return ""
	}
	return AddressOf(i.cfg.Socket)
}

// AddressOf returns the Workload API address of a socket's path.
func AddressOf(path string) string { return "unix://" + path }

// Run serves until ctx ends, and then returns nil, closed. It can be called once.
func (i *Issuer) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for n, server := range i.servers {
		group.Go(func() error { return server.Serve(i.listeners[n]) })
	}
	group.Go(func() error {
		<-ctx.Done()
		return i.Close()
	})
	if err := group.Wait(); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("development issuer: %w", err)
	}
	return nil
}

// Close cuts every stream off and removes the sockets. It is idempotent and safe
// for concurrent use.
func (i *Issuer) Close() error {
	for _, s := range i.servers {
		s.Stop() // not gracefully: streams never end by themselves
	}
	var errs []error
	for _, l := range i.listeners {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

func (i *Issuer) listen(endpoints []endpoint) error {
	for _, e := range endpoints {
		if err := privateDirectory(filepath.Dir(e.path)); err != nil {
			return err
		}
		l, err := identity.Listen(context.Background(), e.path, 0o600, -1)
		if err != nil {
			return err
		}
		i.listeners = append(i.listeners, l)
		s, err := i.server(e)
		if err != nil {
			return err
		}
		i.servers = append(i.servers, s)
	}
	return nil
}

// privateDirectory makes dir for us alone, or checks that it is.
func privateDirectory(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Lstat(dir)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is no directory", dir)
	case info.Mode().Perm()&^fs.FileMode(0o700) != 0:
		return fmt.Errorf("%s is open to others (mode %v), who could take identities there; use a directory of mode 0700", dir, info.Mode().Perm())
	case !ours(info):
		return fmt.Errorf("%s belongs to somebody else", dir)
	}
	return nil
}

// server is a gRPC server of the Workload API that knows its clients by kernel
// credentials.
func (i *Issuer) server(e endpoint) (*grpc.Server, error) {
	creds, err := identity.NewCredentials(identity.Config{TrustDomain: i.cfg.TrustDomain})
	if err != nil {
		return nil, err
	}
	s := grpc.NewServer(
		grpc.Creds(creds),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(connectionTimeout),
		grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(checkUnary),
		grpc.StreamInterceptor(checkStream),
	)
	workload.RegisterSpiffeWorkloadAPIServer(s, &api{issuer: i, idFor: e.idFor})
	return s, nil
}
