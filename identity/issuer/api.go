package issuer

import (
	"context"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/kms-agent/kms-agent/identity"
)

// Bounds of one request.
const (
	maxAudiences = 16
	maxAudience  = 2048
	maxToken     = 16 << 10
)

// checkUnary and checkStream hold the Workload Endpoint's rule (section 3) that
// every request carries workload.spiffe.io: true. A program that was tricked into
// sending a request elsewhere than it meant does not set it.
func checkUnary(ctx context.Context, request any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := checkHeader(ctx); err != nil {
		return nil, err
	}
	return next(ctx, request)
}

func checkStream(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := checkHeader(stream.Context()); err != nil {
		return err
	}
	return next(server, stream)
}

func checkHeader(ctx context.Context) error {
	if !slices.Equal(metadata.ValueFromIncomingContext(ctx, "workload.spiffe.io"), []string{"true"}) {
		return status.Error(codes.InvalidArgument, "the request lacks the metadata workload.spiffe.io: true")
	}
	return nil
}

// api answers the clients of one endpoint.
type api struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	issuer *Issuer
	idFor  func(identity.Peer) (spiffeid.ID, bool)
}

// caller says which identity the process at the other end has now.
func (a *api) caller(ctx context.Context) (spiffeid.ID, error) {
	peer, ok := identity.PeerFromContext(ctx)
	if ok {
		if id, ok := a.idFor(peer); ok {
			if err := checkID(id, a.issuer.cfg.TrustDomain); err != nil {
				return spiffeid.ID{}, status.Errorf(codes.Internal, "the development issuer is configured wrongly: %v", err)
			}
			return id, nil
		}
	}
	return spiffeid.ID{}, status.Errorf(codes.PermissionDenied, "no identity issued: the development issuer knows none for uid %d", peer.UID)
}

// FetchX509SVID sends an SVID at once and its successor when half of its life is
// over, for as long as the process has an identity.
func (a *api) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	for {
		id, err := a.caller(stream.Context())
		if err != nil {
			return err
		}
		if err := a.sendX509SVID(id, stream); err != nil {
			return err
		}
		renewal := time.NewTimer(a.issuer.cfg.TTL / 2)
		select {
		case <-renewal.C:
		case <-stream.Context().Done():
			renewal.Stop()
			return stream.Context().Err()
		}
	}
}

func (a *api) sendX509SVID(id spiffeid.ID, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	cert, key, err := a.issuer.authority.x509SVID(id, time.Now(), a.issuer.cfg.TTL)
	if err != nil {
		return status.Errorf(codes.Internal, "issue an X.509-SVID: %v", err)
	}
	defer clear(key)
	return stream.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId: id.String(), X509Svid: cert, X509SvidKey: key, Bundle: a.issuer.authority.cert.Raw,
	}}})
}

// FetchX509Bundles sends the bundle, which never changes.
func (a *api) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	if _, err := a.caller(stream.Context()); err != nil {
		return err
	}
	bundles := map[string][]byte{a.issuer.cfg.TrustDomain.IDString(): a.issuer.authority.cert.Raw}
	if err := stream.Send(&workload.X509BundlesResponse{Bundles: bundles}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}

// FetchJWTBundles sends the bundle, which never changes.
func (a *api) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	if _, err := a.caller(stream.Context()); err != nil {
		return err
	}
	bundles := map[string][]byte{a.issuer.cfg.TrustDomain.IDString(): a.issuer.authority.jwks}
	if err := stream.Send(&workload.JWTBundlesResponse{Bundles: bundles}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}

// FetchJWTSVID issues a token for the audiences asked for.
func (a *api) FetchJWTSVID(ctx context.Context, r *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if err := checkAudience(r.GetAudience()); err != nil {
		return nil, err
	}
	id, err := a.caller(ctx)
	if err != nil {
		return nil, err
	}
	if asked := r.GetSpiffeId(); asked != "" && asked != id.String() {
		return nil, status.Error(codes.PermissionDenied, "no identity issued: the process does not have the SPIFFE ID it asks for")
	}
	token, err := a.issuer.authority.jwtSVID(id, r.GetAudience(), time.Now(), a.issuer.cfg.JWTTTL)
	if err != nil {
		return nil, status.Errorf(codes.Internal, "issue a JWT-SVID: %v", err)
	}
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: id.String(), Svid: token}}}, nil
}

func checkAudience(audience []string) error {
	if len(audience) == 0 || len(audience) > maxAudiences {
		return status.Errorf(codes.InvalidArgument, "give one audience, and %d at most", maxAudiences)
	}
	for _, a := range audience {
		if a == "" || len(a) > maxAudience {
			return status.Errorf(codes.InvalidArgument, "an audience is between 1 and %d bytes long", maxAudience)
		}
	}
	return nil
}

// ValidateJWTSVID checks a token of this trust domain.
func (a *api) ValidateJWTSVID(ctx context.Context, r *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	// Without an audience every token would do.
	if err := checkAudience([]string{r.GetAudience()}); err != nil {
		return nil, err
	}
	if len(r.GetSvid()) > maxToken {
		return nil, status.Errorf(codes.InvalidArgument, "a token is at most %d bytes long", maxToken)
	}
	if _, err := a.caller(ctx); err != nil {
		return nil, err
	}
	svid, err := jwtsvid.ParseAndValidate(r.GetSvid(), jwtbundle.NewSet(a.issuer.authority.jwtKeys), []string{r.GetAudience()})
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the token is not valid: %v", err)
	}
	claims, err := structpb.NewStruct(svid.Claims)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the token's claims cannot be passed on: %v", err)
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: svid.ID.String(), Claims: claims}, nil
}
