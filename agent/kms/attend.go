package kms

import (
	"context"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// attendEvery is how often the agent looks for keys that are not well.
	attendEvery = time.Second
	// attendFirst is how long after a key was found not to be well it is asked about first,
	// and attendLongest the longest pause: twice as long each time. Both have jitter.
	attendFirst, attendLongest = 5 * time.Second, 20 * time.Second
	// attendTimeout bounds one.
	attendTimeout = 10 * time.Second
	// maxAttended bounds the keys of one backend that are asked about at once.
	maxAttended = 8
)

// attention paces what is asked of a key that is not well. Run alone uses it.
type attention struct {
	tries int
	next  time.Duration
}

// due tells whether the key is to be asked about now; then it is not for a while.
func (a *attention) due(now time.Duration) bool {
	if a.tries > 0 && now < a.next {
		return false
	}
	pause := min(attendFirst<<min(max(0, a.tries-1), 16), attendLongest)
	a.next = now + time.Duration((1+mathrand.Float64()/2)*float64(pause)) //nolint:gosec // no secret
	a.tries++
	return a.tries > 1 // at first there are those who have heard it
}

// attendAlways looks for keys that are not well until ctx ends.
func (s *Service) attendAlways(ctx context.Context) {
	tick := time.NewTicker(attendEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.attend(ctx)
		}
	}
}

// attend asks about keys that are not well, as nobody else may for long: what is told of
// them would not be so any more.
func (s *Service) attend(ctx context.Context) {
	asked := map[string]int{} // by backend
	var under sync.WaitGroup
	for _, k := range s.state.Load().keys { // in no order, so that each has its turn
		backend := k.group.id.backend
		switch {
		case !s.health(k).askable:
			k.group.attention = attention{}
		case asked[backend] < maxAttended && k.group.attention.due(s.now()):
			asked[backend]++
			under.Go(func() { s.attendTo(ctx, k) })
		}
	}
	under.Wait()
}

// attendTo asks what the versions of a key are, and where that is no reason any more why
// it is not well, for a confirmation.
func (s *Service) attendTo(ctx context.Context, k *key) {
	ctx, cancel := context.WithTimeout(forAll(ctx), attendTimeout)
	defer cancel()
	g, enabled := k.group, false
	current := make(versions, len(g.parts))
	for part, w := range g.parts {
		d, err := s.askDescription(ctx, w)
		if err != nil {
			continue
		}
		current[part] = d.Current
		v := findVersion(d.Description, d.Current)
		enabled = enabled || v != nil && v.State == plugins.Enabled
	}
	if !enabled || !s.inUse(g) {
		return
	}
	for _, direction := range []cache.Direction{cache.Encrypt, cache.Decrypt} {
		s.cache.Revisit(g.authority(current, direction))
	}
}
