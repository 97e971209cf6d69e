package kms

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
)

const (
	// opPrewarm names the operation in the audit record. The configuration permits it,
	// and nobody else gets anything of it.
	opPrewarm policy.Operation = "prewarm"
	// prewarming is how many data keys are asked for at a time.
	prewarming = 4
)

// Sealed is what a data key stands in: the EDKs of a message, or one that was
// exported, with the encryption context.
type Sealed struct {
	EDKs    []envelope.EDK
	Context map[string]string
}

// Held is what came of holding data keys ready.
type Held struct {
	// Ready are in the cache now, New of them were unwrapped for it.
	Ready, New int
	// Err is why another one is not; nil where none is missing.
	Err error
}

// Prewarm has data keys of a key in the cache, and keeps them there for as long as it
// is called again before they are idle for too long. There is an audit record where
// anything was unwrapped for it.
func (s *Service) Prewarm(ctx context.Context, name string, keys []Sealed) Held {
	began := s.begin(Call{Door: "agent"}, opPrewarm)
	k := began.state.keys[name]
	if k == nil {
		return Held{Err: fmt.Errorf("there is no key %q", name)}
	}
	uses := make([]*cache.Use, len(keys))
	errs := make([]error, len(keys))
	var all errgroup.Group
	all.SetLimit(prewarming)
	for i, one := range keys {
		all.Go(func() error {
			uses[i], errs[i] = began.hold(ctx, k, one)
			return nil
		})
	}
	_ = all.Wait() // errs has the errors
	var held Held
	for i, use := range uses {
		if use == nil {
			held.Err = errs[i]
			continue
		}
		held.Ready++
		if use.Freshness().Source == cache.Upstream {
			held.New++
		}
		use.Release()
	}
	if held.New == 0 {
		return held
	}
	began.record.Key, began.record.Backend = k.Name, k.group.id.backend
	began.note = fmt.Sprintf("%d data keys are held ready, %d of them new", held.Ready, held.New)
	if err := began.finish(ctx, nil); err != nil {
		held.Err = err
	}
	return held
}

// hold takes one data key from the cache, to stay there.
func (t *transaction) hold(ctx context.Context, k *key, one Sealed) (*cache.Use, error) {
	infos := make([]*envelope.ProviderInfo, len(one.EDKs))
	for i, edk := range one.EDKs {
		if info, err := envelope.ParseProviderInfo(edk.ProviderInfo); err == nil && edk.ProviderID == envelope.ProviderID {
			infos[i] = &info
		}
	}
	edks, err := t.recogniseAll(k, one.EDKs, infos, one.Context, envelope.PurposeMessage, envelope.PurposeExported)
	if err != nil {
		return nil, err
	}
	scratch := &transaction{service: t.service, state: t.state, call: t.call, arrived: t.arrived, began: t.began, holds: true}
	use, _, err := scratch.decryptionKey(forAll(ctx), k, distinct(edks))
	return use, err
}
