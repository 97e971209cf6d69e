package plugins

import (
	"context"
	"crypto/rand"
	"slices"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

const (
	// CapabilityRandom is the capability of a backend that is a RandomSource.
	CapabilityRandom = "random"
	// MaxRandomSize is how many bytes one Random gives at most.
	MaxRandomSize = 1024

	// randomNonceSize is how long a request's nonce is.
	randomNonceSize = 16
)

// RandomSource is what a Backend is besides whose upstream has a random bit
// generator of its own. It counts only where Info names CapabilityRandom.
type RandomSource interface {
	// Random fills dst, 1 to MaxRandomSize bytes, with random of upstream, never of
	// the host's own. dst is written during the call only, and zero or as it was
	// after an error. Another number of bytes is Invalid.
	Random(ctx context.Context, dst []byte) error
}

// Gives tells whether the backend has a capability.
func (i Info) Gives(capability string) bool { return slices.Contains(i.Capabilities, capability) }

// Random implements RandomSource; Invalid where the plugin does not have the
// capability, which it is then not asked for.
func (r *Remote) Random(ctx context.Context, dst []byte) error {
	if err := checkRandom(len(dst)); err != nil {
		return err
	}
	s, err := r.open()
	if err != nil {
		return err
	}
	if !r.random.Load() {
		return noRandom()
	}
	nonce := make([]byte, randomNonceSize)
	_, _ = rand.Read(nonce) // never fails: crypto/rand
	answer, callErr := r.service.Random(ctx, &pluginv1.RandomRequest{Length: uint32(len(dst)), Nonce: nonce})
	if callErr != nil {
		return fromStatus(ctx, callErr)
	}
	random, openErr := s.open(s.toHost, answer.GetRandom(), randomAAD(nonce))
	if openErr != nil {
		return &Error{Class: Internal, Detail: "malformed answer", Err: openErr}
	}
	defer clear(random)
	if len(random) != len(dst) {
		return malformed("gave %d random bytes, %d were asked for", len(random), len(dst))
	}
	copy(dst, random)
	return nil
}

// Random implements the RPC.
func (s *server) Random(ctx context.Context, r *pluginv1.RandomRequest) (*pluginv1.RandomResponse, error) {
	session, err := s.ready()
	if err != nil {
		return nil, err
	}
	if s.random == nil {
		return nil, toStatus(noRandom())
	}
	if err := firstError(checkRandom(int(r.GetLength())), checkNonce(r.GetNonce())); err != nil {
		return nil, toStatus(err)
	}
	random := make([]byte, r.GetLength())
	defer clear(random)
	if err := s.random.Random(ctx, random); err != nil {
		return nil, toStatus(err)
	}
	sealed, err := session.seal(session.toHost, random, randomAAD(r.GetNonce()))
	if err != nil {
		return nil, toStatus(&Error{Class: Internal, Err: err})
	}
	return &pluginv1.RandomResponse{Random: sealed}, nil
}

// randomOf returns the backend as the source that it says to be; nil where it does
// not. One that says so and is none is broken.
func randomOf(b Backend, info Info) (RandomSource, *Error) {
	if !info.Gives(CapabilityRandom) {
		return nil, nil
	}
	source, ok := b.(RandomSource)
	if !ok {
		return nil, Errorf(Internal, "the backend names the capability %s and does not have it", CapabilityRandom)
	}
	return source, nil
}

// randomAAD is what sealed random is bound to: one request, and not one for key
// material.
func randomAAD(nonce []byte) []byte {
	return appendField(appendField(appendField(nil, sessionToHost), "Random"), string(nonce))
}

func noRandom() *Error {
	return Errorf(Invalid, "the backend gives no random: its plugin does not have the capability %s", CapabilityRandom)
}

func checkRandom(n int) *Error {
	if n < 1 || n > MaxRandomSize {
		return Errorf(Invalid, "1 to %d random bytes can be asked for, not %d", MaxRandomSize, n)
	}
	return nil
}

func checkNonce(nonce []byte) *Error {
	if len(nonce) != randomNonceSize {
		return Errorf(Invalid, "the nonce of a request has %d bytes, not %d", randomNonceSize, len(nonce))
	}
	return nil
}
