// Package native translates the kmsagent.v1 protocol into operations of kms.
package native

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/serve"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/envelope"
)

// maxKeyListPageToken bounds a page token, which is a key's name.
const maxKeyListPageToken = 128

// Register puts the kmsagent.v1.KMS service on a server made by the door.
func Register(s *grpc.Server, d *serve.Door) {
	kmsagentv1.RegisterKMSServer(s, &server{service: d.Service, limits: d.Limits})
}

type server struct {
	kmsagentv1.UnimplementedKMSServer
	service *kms.Service
	limits  serve.Limits
}

// call adds the caller's own terms to what the door found out. What it refuses
// is on the record.
func (s *server) call(ctx context.Context, operation string, maxStale *durationpb.Duration) (kms.Call, error) {
	c := serve.CallFrom(ctx)
	if maxStale == nil {
		return c, nil
	}
	d := maxStale.AsDuration()
	if err := maxStale.CheckValid(); err != nil || d < 0 {
		return c, s.invalid(ctx, c, operation, "max_stale must be a duration of zero or more")
	}
	c.MaxStale = &d
	return c, nil
}

func (s *server) invalid(ctx context.Context, c kms.Call, operation, message string) error {
	return s.service.Refuse(ctx, c, operation, &kms.Error{Reason: kms.ReasonInvalidRequest, Message: message})
}

// fits refuses a payload over the limit, on the record.
func (s *server) fits(ctx context.Context, c kms.Call, operation, key string, size int) error {
	if size <= s.limits.MaxPayload {
		return nil
	}
	return s.service.Refuse(ctx, c, operation, &kms.Error{
		Reason: kms.ReasonTooLarge, Key: key,
		Message: fmt.Sprintf("%d bytes are more than one request may hold (%d); use the stream operations", size, s.limits.MaxPayload),
	})
}

// fitsMessage is fits for a message, which is larger than its plaintext.
func (s *server) fitsMessage(ctx context.Context, c kms.Call, operation string, size int) error {
	return s.fits(ctx, c, operation, "", size-envelope.MaxHeaderSize)
}

func (s *server) Encrypt(ctx context.Context, r *kmsagentv1.EncryptRequest) (*kmsagentv1.EncryptResponse, error) {
	c, err := s.call(ctx, "encrypt", r.GetMaxStale())
	if err != nil {
		return nil, err
	}
	if err := s.fits(ctx, c, "encrypt", r.GetKey(), len(r.GetPlaintext())); err != nil {
		return nil, err
	}
	out, err := s.service.Encrypt(ctx, c, kms.EncryptRequest{Key: r.GetKey(), Plaintext: r.GetPlaintext(), Context: r.GetContext()})
	clear(r.GetPlaintext())
	if err != nil {
		return nil, err
	}
	return &kmsagentv1.EncryptResponse{Message: out.Message, KeyUse: keyUse(out.KeyUse)}, nil
}

func (s *server) Decrypt(ctx context.Context, r *kmsagentv1.DecryptRequest) (*kmsagentv1.DecryptResponse, error) {
	c, err := s.call(ctx, "decrypt", r.GetMaxStale())
	if err != nil {
		return nil, err
	}
	if err := s.fitsMessage(ctx, c, "decrypt", len(r.GetMessage())); err != nil {
		return nil, err
	}
	out, err := s.service.Decrypt(ctx, c, kms.DecryptRequest{Message: r.GetMessage(), ExpectedContext: r.GetExpectedContext()})
	if err != nil {
		return nil, err
	}
	return &kmsagentv1.DecryptResponse{Plaintext: out.Plaintext, KeyUse: keyUse(out.KeyUse), Context: out.Context}, nil
}

func (s *server) ReEncrypt(ctx context.Context, r *kmsagentv1.ReEncryptRequest) (*kmsagentv1.ReEncryptResponse, error) {
	c, err := s.call(ctx, "reencrypt", r.GetMaxStale())
	if err != nil {
		return nil, err
	}
	if err := s.fitsMessage(ctx, c, "reencrypt", len(r.GetMessage())); err != nil {
		return nil, err
	}
	out, err := s.service.ReEncrypt(ctx, c, kms.ReEncryptRequest{
		Message: r.GetMessage(), ExpectedContext: r.GetExpectedContext(), DestinationKey: r.GetDestinationKey(),
		DestinationContext: r.GetDestinationContext(), ReplaceContext: r.GetReplaceContext(),
	})
	if err != nil {
		return nil, err
	}
	return &kmsagentv1.ReEncryptResponse{Message: out.Message, Source: keyUse(out.Source), Destination: keyUse(out.Destination)}, nil
}

func (s *server) GenerateDataKey(ctx context.Context, r *kmsagentv1.GenerateDataKeyRequest) (*kmsagentv1.GenerateDataKeyResponse, error) {
	c, err := s.call(ctx, "generate-data-key", r.GetMaxStale())
	if err != nil {
		return nil, err
	}
	out, err := s.service.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: r.GetKey(), Context: r.GetContext()})
	if err != nil {
		return nil, err
	}
	return &kmsagentv1.GenerateDataKeyResponse{
		Plaintext: out.Plaintext, EncryptedDataKey: edkMessage(out.EDKs), KeyUse: keyUse(out.KeyUse), UseUntil: timestamppb.New(out.UseUntil),
	}, nil
}

func (s *server) GenerateDataKeyWithoutPlaintext(ctx context.Context, r *kmsagentv1.GenerateDataKeyWithoutPlaintextRequest) (*kmsagentv1.GenerateDataKeyWithoutPlaintextResponse, error) {
	c, err := s.call(ctx, "generate-data-key-without-plaintext", r.GetMaxStale())
	if err != nil {
		return nil, err
	}
	out, err := s.service.GenerateDataKeyWithoutPlaintext(ctx, c, kms.GenerateDataKeyRequest{Key: r.GetKey(), Context: r.GetContext()})
	if err != nil {
		return nil, err
	}
	return &kmsagentv1.GenerateDataKeyWithoutPlaintextResponse{EncryptedDataKey: edkMessage(out.EDKs), KeyUse: keyUse(out.KeyUse)}, nil
}

func (s *server) DecryptDataKey(ctx context.Context, r *kmsagentv1.DecryptDataKeyRequest) (*kmsagentv1.DecryptDataKeyResponse, error) {
	c, err := s.call(ctx, "decrypt-data-key", r.GetMaxStale())
	if err != nil {
		return nil, err
	}
	out, err := s.service.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: EDKs(r.GetEncryptedDataKey()), Context: r.GetContext()})
	if err != nil {
		return nil, err
	}
	return &kmsagentv1.DecryptDataKeyResponse{Plaintext: out.Plaintext, KeyUse: keyUse(out.KeyUse), UseUntil: timestamppb.New(out.UseUntil)}, nil
}

func (s *server) Wrap(ctx context.Context, r *kmsagentv1.WrapRequest) (*kmsagentv1.WrapResponse, error) {
	out, err := s.service.Wrap(ctx, serve.CallFrom(ctx), kms.WrapRequest{Key: r.GetKey(), Plaintext: r.GetPlaintext(), Context: r.GetContext()})
	clear(r.GetPlaintext())
	if err != nil {
		return nil, err
	}
	return &kmsagentv1.WrapResponse{Wrapped: edkMessage(out.EDKs), KeyUse: keyUse(out.KeyUse)}, nil
}

func (s *server) Unwrap(ctx context.Context, r *kmsagentv1.UnwrapRequest) (*kmsagentv1.UnwrapResponse, error) {
	c, err := s.call(ctx, "unwrap", r.GetMaxStale())
	if err != nil {
		return nil, err
	}
	out, err := s.service.Unwrap(ctx, c, kms.UnwrapRequest{EDKs: EDKs(r.GetWrapped()), Context: r.GetContext()})
	if err != nil {
		return nil, err
	}
	return &kmsagentv1.UnwrapResponse{Plaintext: out.Plaintext, KeyUse: keyUse(out.KeyUse)}, nil
}

func (s *server) GenerateRandom(ctx context.Context, r *kmsagentv1.GenerateRandomRequest) (*kmsagentv1.GenerateRandomResponse, error) {
	random, err := s.service.GenerateRandom(ctx, serve.CallFrom(ctx), int(r.GetLength()))
	if err != nil {
		return nil, err
	}
	return &kmsagentv1.GenerateRandomResponse{Random: random}, nil
}

func (s *server) DescribeKey(ctx context.Context, r *kmsagentv1.DescribeKeyRequest) (*kmsagentv1.DescribeKeyResponse, error) {
	d, err := s.service.DescribeKey(ctx, serve.CallFrom(ctx), r.GetKey())
	if err != nil {
		return nil, err
	}
	return &kmsagentv1.DescribeKeyResponse{Key: keyMessage(d)}, nil
}

func (s *server) ListKeys(ctx context.Context, r *kmsagentv1.ListKeysRequest) (*kmsagentv1.ListKeysResponse, error) {
	if len(r.GetPageToken()) > maxKeyListPageToken {
		return nil, s.invalid(ctx, serve.CallFrom(ctx), "list-keys", "page_token is not one that ListKeys gave")
	}
	keys, more, err := s.service.ListKeys(ctx, serve.CallFrom(ctx), r.GetPageToken(), int(min(r.GetPageSize(), kms.MaxPageSize)))
	if err != nil {
		return nil, err
	}
	out := &kmsagentv1.ListKeysResponse{}
	for _, k := range keys {
		out.Keys = append(out.Keys, keyMessage(k))
	}
	if more {
		out.NextPageToken = keys[len(keys)-1].Name
	}
	return out, nil
}

func (s *server) WhoAmI(ctx context.Context, _ *kmsagentv1.WhoAmIRequest) (*kmsagentv1.WhoAmIResponse, error) {
	c, err := s.service.WhoAmI(ctx, serve.CallFrom(ctx))
	if err != nil {
		return nil, err
	}
	out := &kmsagentv1.WhoAmIResponse{
		SpiffeId: c.ID.String(), Proof: string(c.Proof), Uid: c.Peer.UID, Gid: c.Peer.GID, Pid: c.Peer.PID,
	}
	if !c.Expires.IsZero() {
		out.Expires = timestamppb.New(c.Expires)
	}
	return out, nil
}
