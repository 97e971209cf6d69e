package kms

import (
	"context"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/plugins"
)

// describeGroup returns the current versions of the parts. A part of which nothing is
// known is left out, as long as there is another.
func (s *Service) describeGroup(ctx context.Context, g *group, maxAge time.Duration) (versions, []*described, error) {
	known := make([]*described, len(g.parts))
	var stale []int
	for part, w := range g.parts {
		if d := w.described.Load(); d != nil && s.now()-d.at <= maxAge {
			known[part] = d
		} else {
			stale = append(stale, part)
		}
	}
	if len(stale) > 0 {
		if err := s.describeStale(ctx, g, stale, known, maxAge); err != nil {
			return nil, nil, err
		}
	}
	v := make(versions, len(g.parts))
	for part, d := range known {
		if d != nil {
			v[part] = d.Current
		}
	}
	return v, known, nil
}

// describeStale fills in what is missing. What is said later is known the next time.
func (s *Service) describeStale(ctx context.Context, g *group, stale []int, known []*described, maxAge time.Duration) error {
	if len(g.parts) == 1 {
		d, err := s.describe(ctx, g.parts[0], maxAge)
		known[0] = d
		return err
	}
	alone := !slices.ContainsFunc(g.parts, func(w *wrapping) bool { return w.described.Load() != nil })
	fresh := make([]atomic.Pointer[described], len(g.parts))
	errs := s.poll(ctx, g, stale, polling{
		allowance: describePatience,
		ask: func(ctx context.Context, part int) error {
			d, err := s.describePart(ctx, g.parts[part], maxAge, alone)
			fresh[part].Store(d)
			return err
		},
	})
	for part, w := range g.parts {
		if known[part] == nil {
			known[part] = fresh[part].Load()
		}
		if _, answered := errs[part]; known[part] == nil && !answered {
			known[part] = w.described.Load() // what is late is known the next time
			w.failures.CompareAndSwap(0, 1)  // and not waited for
		}
		if known[part] != nil {
			errs[part] = nil
		}
	}
	return s.combine(g, errs)
}

// describePart is describe for one of several wrapping keys. One of which nothing is known
// yet is not waited for where there are others, unless this is the first time.
func (s *Service) describePart(ctx context.Context, w *wrapping, maxAge time.Duration, alone bool) (*described, error) {
	if alone || w.described.Load() != nil {
		return s.describe(ctx, w, maxAge)
	}
	lately := s.now()-time.Duration(w.asked.Load()) < w.describePause(maxAge)
	switch {
	case lately && w.missing.Load():
		return nil, plugins.Errorf(plugins.KeyNotFound, "backend %s does not have %s", w.id.backend, w.id.uri)
	case lately && w.failures.Load() > 0:
		return nil, plugins.Errorf(plugins.Unavailable, "backend %s has not told of %s yet", w.id.backend, w.id.uri)
	}
	bounded, cancel := context.WithTimeout(ctx, max(hedgeAfter, w.patience(max(maxAge, 1))))
	defer cancel()
	d, err := s.askDescription(bounded, w)
	if err != nil && ctx.Err() == nil && bounded.Err() != nil {
		w.failures.CompareAndSwap(0, 1) // too slow to be waited for again
	}
	return d, err
}

// described is what upstream said of a wrapping key, and when it was asked.
type described struct {
	plugins.Description
	at time.Duration
}

// describe returns what is known of the versions, asking upstream when it is
// older than maxAge. While upstream does not answer, the last answer stands:
// whether a key may still be used is the cache's decision, not this one's.
func (s *Service) describe(ctx context.Context, w *wrapping, maxAge time.Duration) (*described, error) {
	known := w.described.Load()
	now := s.now()
	if known != nil && now-known.at <= maxAge {
		return known, nil
	}
	if known == nil {
		return s.askDescription(ctx, w)
	}
	if now-time.Duration(w.asked.Load()) < w.describePause(maxAge) {
		return known, nil
	}
	bounded, cancel := context.WithTimeout(ctx, w.patience(maxAge))
	defer cancel()
	fresh, err := s.askDescription(bounded, w)
	switch {
	case err == nil:
		return fresh, nil
	case plugins.ClassOf(err).Definite():
		return nil, err
	case ctx.Err() == nil && bounded.Err() != nil:
		w.failures.CompareAndSwap(0, 1) // too slow to be waited for again
	}
	return known, nil
}

// patience is how long a request waits for the answer. In an outage who asks does so
// for those who come later; who can do nothing with the last answer waits.
func (w *wrapping) patience(maxAge time.Duration) time.Duration {
	switch {
	case maxAge <= 0:
		return describeTimeout
	case w.failures.Load() > 0:
		return 0
	}
	return describePatience
}

// describePause is how long an answer that is too old is not asked for again: twice
// as long with each question that has failed, up to half of the age, so that the
// agents of a fleet do not all ask when upstream is back.
func (w *wrapping) describePause(maxAge time.Duration) time.Duration {
	failed := min(w.failures.Load(), 16)
	if failed == 0 {
		return describePause
	}
	spread := 1 + float64(w.jitter.Load())/math.MaxUint32/2
	return max(describePause, time.Duration(spread*float64(min(describePause<<failed, maxAge/2))))
}

// askAgain makes the next use of the wrapping key ask for its versions, however new
// the last answer is. Where upstream does not answer, the last answer stands.
func (w *wrapping) askAgain() {
	for {
		old := w.described.Load()
		if old == nil {
			return
		}
		if w.described.CompareAndSwap(old, &described{Description: old.Description, at: longAgo}) {
			w.asked.Store(int64(longAgo))
			return
		}
	}
}

// longAgo is before anything that a caller may find too old.
const longAgo = time.Duration(-1 << 61)

// askDescription asks upstream, once for all who wait.
func (s *Service) askDescription(ctx context.Context, w *wrapping) (*described, error) {
	result := w.flight.DoChan("", func() (any, error) {
		detached, done, err := s.strays.begin(forAll(ctx))
		if err != nil {
			return nil, err
		}
		defer done()
		return s.askForItself(detached, w)
	})
	select {
	case r := <-result:
		fresh, _ := r.Val.(*described)
		return fresh, r.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// askForItself asks upstream with a question of its own. An answer to an older
// question does not replace one to a newer.
func (s *Service) askForItself(ctx context.Context, w *wrapping) (*described, error) {
	ctx, cancel := context.WithTimeout(ctx, describeTimeout)
	defer cancel()
	began, clock := s.now(), time.Now()
	w.asked.Store(int64(began))
	d, err := w.backend.Describe(ctx, w.id.uri)
	if err != nil {
		if verdictOf(err) == cache.Unreachable {
			w.failures.Add(1)
			w.jitter.Store(mathrand.Uint32()) //nolint:gosec // no secret
		}
		s.descriptionFailed(w, err, began)
		return nil, fmt.Errorf("describe %s: %w", w.id.uri, err)
	}
	s.unrefused(w, w.told(d, clock))
	w.missing.Store(false)
	w.failures.Store(0)
	fresh := &described{Description: d, at: began}
	for {
		old := w.described.Load()
		switch {
		case old != nil && old.at > began:
			return fresh, nil
		case !w.described.CompareAndSwap(old, fresh):
			continue
		case old != nil && old.Current != d.Current:
			s.rotated(w)
		}
		_ = s.enabled(w, d, d.Current, clock) // that it is not is a no, whoever asked
		return fresh, nil
	}
}

// rotated retires what is wrapped under versions that are not current any more.
func (s *Service) rotated(w *wrapping) {
	g := w.group.Load()
	if g == nil {
		return
	}
	v := make(versions, len(g.parts))
	for part, other := range g.parts {
		if d := other.described.Load(); d != nil {
			v[part] = d.Current
		}
	}
	s.cache.EvictVersions(g.id.backend, g.id.uri, v.name())
}

// descriptionFailed lets the cache suspend, and ask for itself, when upstream
// says that the wrapping key is gone, or denied.
func (s *Service) descriptionFailed(w *wrapping, err error, began time.Duration) {
	if !plugins.ClassOf(err).Definite() {
		return
	}
	class, before := plugins.ClassOf(err), w.refused.Load()
	if class != plugins.KeyNotFound || !w.denied() {
		w.refused.Store(&refusal{why: err.Error(), class: class, at: time.Now()})
	}
	g := w.group.Load()
	if g == nil || !g.refuses(err) || before != nil && before.class == class {
		return
	}
	s.cache.Refuse(g.id.backend, g.id.uri, func(cache.Authority) bool { return true }, err, began)
	s.cache.NotesChanged(true)
}

// refuses tells whether what one part says is a no for the whole group: that only one
// of several does not have the key is none.
func (g *group) refuses(err error) bool {
	return verdictOf(err) == cache.No && (len(g.parts) == 1 || plugins.ClassOf(err) != plugins.KeyNotFound)
}

// knows tells whether upstream has said that the version exists. A version
// that nobody knows may be a new one: the list is asked for again, at most
// once in describePause, but the version itself is never tried upstream on a
// caller's word. While the list cannot be asked for, nobody says that there is
// no such version.
func (s *Service) knows(ctx context.Context, w *wrapping, version string) error {
	began := s.now()
	known, err := s.describe(ctx, w, time.Duration(1<<62))
	if err != nil {
		return err
	}
	if findVersion(known.Description, version) != nil {
		return nil
	}
	if known, err = s.describe(ctx, w, 0); err != nil {
		return err
	}
	switch {
	case findVersion(known.Description, version) != nil:
		return nil
	case known.at < began:
		return &plugins.Error{
			Class: plugins.Unavailable, RetryAfter: describePause,
			Detail: fmt.Sprintf("version %q of %s is not among those last heard of, and the backend has not been asked since", version, w.id.uri),
		}
	}
	return plugins.Errorf(plugins.KeyNotFound, "%s has no version %q", w.id.uri, version)
}

// hasToldOf is knows without a question.
func (w *wrapping) hasToldOf(version string) bool {
	d := w.described.Load()
	return d != nil && findVersion(d.Description, version) != nil
}

func findVersion(d plugins.Description, version string) *plugins.KeyVersion {
	for i := range d.Versions {
		if d.Versions[i].Version == version {
			return &d.Versions[i]
		}
	}
	return nil
}
