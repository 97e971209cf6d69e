package kms_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/plugins"
)

// flooded has no room for one caller, who learns that after a while.
type flooded struct {
	plugins.Backend
	by string
}

func (b *flooded) turn(ctx context.Context) error {
	if plugins.CallerFrom(ctx) != b.by {
		return nil
	}
	time.Sleep(time.Second)
	return &plugins.Error{Class: plugins.Unavailable, Err: plugins.ErrCrowded}
}

func (b *flooded) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, binding plugins.Binding) ([]byte, error) {
	if err := b.turn(ctx); err != nil {
		return nil, err
	}
	return b.Backend.Wrap(ctx, key, plaintext, binding)
}

func (b *flooded) Unwrap(ctx context.Context, key plugins.KeyRef, ciphertext []byte, binding plugins.Binding) ([]byte, error) {
	if err := b.turn(ctx); err != nil {
		return nil, err
	}
	return b.Backend.Unwrap(ctx, key, ciphertext, binding)
}

func (b *flooded) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	if err := b.turn(ctx); err != nil {
		return plugins.Description{}, err
	}
	return b.Backend.Describe(ctx, uri)
}

// What a caller that floods the backend is told is for that caller: others that
// want the same at the same time are served, and nobody hears of an outage.
func TestAFloodIsNobodyElses(t *testing.T) {
	const flooder = "spiffe://example.org/ns/shop/sa/flooder"
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		rule := everything()
		rule.Callers = append(rule.Callers, flooder)
		r.config.Policy = compile(t, rule)
		r.config.Keys[0].Partition = kms.PartitionKey
		r.config.Backends = map[string]plugins.Backend{"local": &flooded{Backend: r.backend, by: flooder}}
		r.apply()
		both := func(what string, do func(kms.Call) error) {
			t.Helper()
			done := make(chan struct{})
			go func() {
				defer close(done)
				if err := do(caller(t, flooder)); err != nil && !strings.Contains(err.Error(), "too many calls wait") {
					t.Errorf("%s of the flood: %v", what, err)
				}
			}()
			synctest.Wait()
			if err := do(caller(t, orders)); err != nil {
				t.Errorf("%s beside a flood: %v", what, err)
			}
			<-done
		}
		var message []byte
		encrypt := func(c kms.Call) error {
			out, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
			if err == nil {
				message = out.Message
			}
			return err
		}
		decrypt := func(c kms.Call) error {
			_, err := r.Decrypt(t.Context(), c, kms.DecryptRequest{Message: message})
			return err
		}
		both("a new data key", encrypt)
		both("an old data key", decrypt)
		r.clock.Advance(time.Hour)
		both("a confirmation for encryption", encrypt)
		both("a confirmation for decryption", decrypt)
	})
}
