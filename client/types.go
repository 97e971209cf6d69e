package client

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// Requests, answers and their parts are those of the protocol; these names save
// an import.

type (
	// EncryptRequest is what Encrypt takes.
	EncryptRequest = kmsagentv1.EncryptRequest
	// EncryptResponse is what Encrypt returns.
	EncryptResponse = kmsagentv1.EncryptResponse
	// DecryptRequest is what Decrypt takes.
	DecryptRequest = kmsagentv1.DecryptRequest
	// DecryptResponse is what Decrypt returns.
	DecryptResponse = kmsagentv1.DecryptResponse
	// ReEncryptRequest is what ReEncrypt takes.
	ReEncryptRequest = kmsagentv1.ReEncryptRequest
	// ReEncryptResponse is what ReEncrypt returns.
	ReEncryptResponse = kmsagentv1.ReEncryptResponse
	// EncryptStreamStart begins an EncryptStream.
	EncryptStreamStart = kmsagentv1.EncryptStreamStart
	// DecryptStreamStart begins a DecryptStream.
	DecryptStreamStart = kmsagentv1.DecryptStreamStart
	// DecryptStreamHeader tells the key and context of a stream that is being decrypted.
	DecryptStreamHeader = kmsagentv1.DecryptStreamHeader
	// EncryptedDataKey is a data key wrapped by a wrapping key, as it stands in a message.
	EncryptedDataKey = kmsagentv1.EncryptedDataKey
	// GenerateDataKeyRequest is what GenerateDataKey takes.
	GenerateDataKeyRequest = kmsagentv1.GenerateDataKeyRequest
	// GenerateDataKeyResponse is what GenerateDataKey returns.
	GenerateDataKeyResponse = kmsagentv1.GenerateDataKeyResponse
	// GenerateDataKeyWithoutPlaintextRequest is what GenerateDataKeyWithoutPlaintext takes.
	GenerateDataKeyWithoutPlaintextRequest = kmsagentv1.GenerateDataKeyWithoutPlaintextRequest
	// GenerateDataKeyWithoutPlaintextResponse is what GenerateDataKeyWithoutPlaintext returns.
	GenerateDataKeyWithoutPlaintextResponse = kmsagentv1.GenerateDataKeyWithoutPlaintextResponse
	// DecryptDataKeyRequest is what DecryptDataKey takes.
	DecryptDataKeyRequest = kmsagentv1.DecryptDataKeyRequest
	// DecryptDataKeyResponse is what DecryptDataKey returns.
	DecryptDataKeyResponse = kmsagentv1.DecryptDataKeyResponse
	// WrapRequest is what Wrap takes.
	WrapRequest = kmsagentv1.WrapRequest
	// WrapResponse is what Wrap returns.
	WrapResponse = kmsagentv1.WrapResponse
	// UnwrapRequest is what Unwrap takes.
	UnwrapRequest = kmsagentv1.UnwrapRequest
	// UnwrapResponse is what Unwrap returns.
	UnwrapResponse = kmsagentv1.UnwrapResponse
	// GenerateRandomRequest is what GenerateRandom takes.
	GenerateRandomRequest = kmsagentv1.GenerateRandomRequest
	// GenerateRandomResponse is what GenerateRandom returns.
	GenerateRandomResponse = kmsagentv1.GenerateRandomResponse
	// DescribeKeyRequest is what DescribeKey takes.
	DescribeKeyRequest = kmsagentv1.DescribeKeyRequest
	// DescribeKeyResponse is what DescribeKey returns.
	DescribeKeyResponse = kmsagentv1.DescribeKeyResponse
	// ListKeysRequest is what ListKeys takes.
	ListKeysRequest = kmsagentv1.ListKeysRequest
	// ListKeysResponse is what ListKeys returns.
	ListKeysResponse = kmsagentv1.ListKeysResponse
	// WhoAmIResponse is what WhoAmI returns.
	WhoAmIResponse = kmsagentv1.WhoAmIResponse
	// Key describes a key of the agent.
	Key = kmsagentv1.Key
	// KeyUse names the key behind an answer; FreshnessOf reads how fresh it is.
	KeyUse = kmsagentv1.KeyUse
)

// Source says how the key behind an answer is known to be good.
type Source = kmsagentv1.Freshness_Source

// The sources of a Freshness.
const (
	SourceUpstream = kmsagentv1.Freshness_SOURCE_UPSTREAM // confirmed upstream for this request
	SourceCached   = kmsagentv1.Freshness_SOURCE_CACHED   // confirmed upstream a while ago, within the key's max_age
	SourceGrace    = kmsagentv1.Freshness_SOURCE_GRACE    // upstream is out of reach; served within the key's grace
)

// Freshness says how the key behind an answer is known to be good, and since
// when.
type Freshness struct {
	Source Source
	// Age is the time since upstream last confirmed the key; zero for
	// SourceUpstream.
	Age time.Duration
	// GraceLeft is the time until the key stops working unless upstream returns;
	// zero but for SourceGrace.
	GraceLeft time.Duration
}

// FreshnessOf reads the freshness of an answer, as in
// FreshnessOf(answer.GetKeyUse()). Of nil it is zero.
func FreshnessOf(use *KeyUse) Freshness {
	f := use.GetFreshness()
	return Freshness{
		Source: f.GetSource(), Age: f.GetAge().AsDuration(), GraceLeft: f.GetGraceLeft().AsDuration(),
	}
}

// proto is the opposite of FreshnessOf.
func (f Freshness) proto() *kmsagentv1.Freshness {
	p := &kmsagentv1.Freshness{Source: f.Source}
	if f.Source != SourceUpstream {
		p.Age = durationpb.New(f.Age)
	}
	if f.Source == SourceGrace {
		p.GraceLeft = durationpb.New(f.GraceLeft)
	}
	return p
}

// MaxStale bounds how old the last confirmation of the key upstream may be for a
// request, as in EncryptRequest{MaxStale: MaxStale(time.Hour)}. Zero demands
// one that is made for the request. A request without it has no bound but the
// key's own.
func MaxStale(age time.Duration) *durationpb.Duration { return durationpb.New(age) }
