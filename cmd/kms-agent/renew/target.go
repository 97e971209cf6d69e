package renew

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// settling is longer than an agent goes without asking its backend for the
// current version. Who has rotated a key just before the run must not be told
// that all is current.
const settling = 1200 * time.Millisecond

// targets knows under what new messages are, by the key of the old ones.
type targets struct {
	mu    sync.Mutex // guards known and lost
	known map[string]Label
	// lost has why DryRun could not find out.
	lost map[string]error
	// asking keeps several workers from asking the same.
	asking sync.Mutex
}

func (t *targets) get(key string) (Label, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l, ok := t.known[key]
	return l, ok
}

func (t *targets) set(key string, l Label) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known == nil {
		t.known = map[string]Label{}
	}
	t.known[key] = l
}

func (t *targets) why(key string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.lost[key]
}

func (t *targets) lose(key string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lost == nil {
		t.lost = map[string]error{}
	}
	t.lost[key] = err
}

// target finds out under what the new message of old would be. The answer of the
// first message of a key holds for the others.
func (r *run) target(ctx context.Context, old heading) (Label, error) {
	if l, ok := r.targets.get(old.label.Key); ok {
		return l, nil
	}
	r.targets.asking.Lock()
	defer r.targets.asking.Unlock()
	if l, ok := r.targets.get(old.label.Key); ok {
		return l, nil
	}
	if err := r.targets.why(old.label.Key); err != nil {
		return Label{}, err
	}
	l, err := r.ask(ctx, old)
	if left := settling - time.Since(r.began); err == nil && r.asWanted(old, l) && left > 0 && pauseFor(ctx, left) {
		l, err = r.ask(ctx, old)
	}
	switch {
	case err == nil:
		r.targets.set(old.label.Key, l)
	case r.DryRun:
		r.targets.lose(old.label.Key, err) // nobody waits for it again
	}
	return l, err
}

// ask has a message of nothing made, with the context of the new message, since
// policy may look at that: its header tells under what new messages are. The key
// is confirmed upstream for it, so that a rotation is seen.
func (r *run) ask(ctx context.Context, old heading) (Label, error) {
	key := old.label.Key
	if r.ToKey != "" {
		key = r.ToKey
	}
	request := &kmsagentv1.EncryptRequest{Key: key, Context: r.contextOf(old.context), MaxStale: durationpb.New(0)}
	var answer *client.EncryptResponse
	err := r.patience.call(ctx, "new messages of "+key, func() error {
		ctx, cancel := r.begun(ctx)
		defer cancel()
		var err error
		answer, err = r.agent.Encrypt(ctx, request)
		return err
	})
	if err != nil {
		return Label{}, err
	}
	made, err := readHeading(bytes.NewReader(answer.GetMessage()))
	if err != nil {
		return Label{}, fail(ReasonMismatch, fmt.Errorf("the agent's answer: %w", err))
	}
	return made.label, nil
}
