package chaos

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kms-agent/kms-agent/agent/serve/native"
	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/envelope"
)

// recorder writes the history.
type recorder struct {
	began   time.Time
	objects map[string]string // names by URI

	mu sync.Mutex // guards h
	h  *history
}

func newRecorder(seed uint64, s setup) *recorder {
	r := &recorder{began: time.Now(), objects: map[string]string{}, h: &history{Seed: seed, Setup: s}}
	for _, k := range s.Keys {
		for _, o := range k.Objects {
			r.objects[o.URI] = o.Name
		}
	}
	return r
}

func (r *recorder) now() time.Duration { return time.Since(r.began) }

// action writes down an action that begins now. It is in effect until it is ended.
func (r *recorder) action(a action) *action {
	r.mu.Lock()
	defer r.mu.Unlock()
	a.Begin, a.Begun, a.Ending, a.Ended = r.now(), never, never, never
	r.h.Actions = append(r.h.Actions, &a)
	return &a
}

// mark sets the times of an action: when it was surely begun, when its end began, and
// when it was surely over.
func (r *recorder) mark(which *time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	*which = r.now()
}

// stalled is how late the host may be, at most, before nothing can be said of who should
// have answered in time.
const stalled = 400 * time.Millisecond

// watchHost writes down when this host has no time for anybody, which is no fault of the
// agent's.
func (r *recorder) watchHost(ctx context.Context, backends []string) {
	const beat = 50 * time.Millisecond
	tick := time.NewTimer(beat)
	defer tick.Stop()
	for before := r.now(); ; before = r.now() {
		tick.Reset(beat)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := r.now()
		if now-before < beat+stalled {
			continue
		}
		r.mu.Lock()
		for _, b := range backends {
			r.h.Actions = append(r.h.Actions, &action{Lane: "host", Fault: "stall", Target: b, Effect: down, Begin: before, Begun: now, Ending: now, Ended: now})
		}
		r.mu.Unlock()
	}
}

// done writes down a call that has ended.
func (r *recorder) done(c *call, err error) {
	c.End = r.now()
	c.Reason, c.Error, c.RequestID = reasonOf(err)
	r.mu.Lock()
	defer r.mu.Unlock()
	c.ID = len(r.h.Calls) + 1
	r.h.Calls = append(r.h.Calls, c)
}

func (r *recorder) calls() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.h.Calls)
}

func reasonOf(err error) (reason, text, requestID string) {
	var e *client.Error
	switch {
	case err == nil:
		return "", "", ""
	case !errors.As(err, &e):
		return "INTERNAL", err.Error(), ""
	case e.Reason != "":
		return string(e.Reason), e.Message, e.RequestID
	case e.Code == codes.DeadlineExceeded:
		return "DEADLINE_EXCEEDED", e.Message, ""
	case e.Code == codes.Canceled:
		return "CANCELLED", e.Message, ""
	case e.Code == codes.Unavailable:
		return unreachable, e.Message, ""
	}
	return e.Code.String(), e.Message, ""
}

// useOf is the key behind an answer.
func (r *recorder) useOf(k *client.KeyUse, encrypt bool, edks []envelope.EDK) use {
	u := use{Key: k.GetKey(), Version: k.GetKeyVersion(), Encrypt: encrypt}
	f := client.FreshnessOf(k)
	switch f.Source {
	case client.SourceUpstream:
		u.Source = upstream
	case client.SourceCached:
		u.Source = cached
	case client.SourceGrace:
		u.Source = grace
	default: // there is none, which is a violation
	}
	u.Age, u.GraceLeft = f.Age, f.GraceLeft
	u.Wraps, u.EDKs = r.wrapsOf(edks)
	return u
}

// wrapsOf are the wraps of a data key as "object@version", and a hash that names it.
func (r *recorder) wrapsOf(edks []envelope.EDK) (wraps []string, id string) {
	h := sha256.New()
	for _, e := range edks {
		_, _ = h.Write(e.Ciphertext)
		if info, err := envelope.ParseProviderInfo(e.ProviderInfo); err == nil {
			wraps = append(wraps, r.objects[info.URI]+"@"+info.Version)
		}
	}
	return wraps, hex.EncodeToString(h.Sum(nil)[:8])
}

func edksOf(message []byte) []envelope.EDK {
	m, err := envelope.Parse(message)
	if err != nil {
		return nil
	}
	return m.EDKs
}

func edkOf(k *client.EncryptedDataKey) []envelope.EDK { return native.EDKs(k) }

func messageID(message []byte) string {
	id := envelope.MessageIDOf(message)
	return hex.EncodeToString(id[:])
}
