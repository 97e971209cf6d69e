package kms

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// hedgeAfter is how long the first backend has for opening a data key before the
	// next is asked too, and how long one that was late the last time is waited for once
	// another has answered.
	hedgeAfter = 150 * time.Millisecond
	// stragglers is how long a wrap waits for further backends once enough of them
	// have wrapped.
	stragglers = time.Second
	// confirmStragglers is that of a confirmation. It is shorter than the patience of
	// those who wait for it: that one backend is slow must not look like an outage.
	confirmStragglers = 500 * time.Millisecond
)

// polling says how parts are asked.
type polling struct {
	ask func(ctx context.Context, part int) error
	// allowance is how long parts are waited for at most once one has said yes.
	allowance time.Duration
	// must tells of parts that are waited for whatever it takes; nil: of none.
	must func(part int) bool
	// late is told what a part said that was not waited for; it may be nil.
	late func(part int, err error)
}

// poll asks some parts at once and returns what they said, by part. A no is not made to
// wait for anything. Calls that are not waited for go on.
func (s *Service) poll(ctx context.Context, g *group, parts []int, p polling) map[int]error {
	errs := make(map[int]error, len(parts))
	if len(parts) == 1 { // as a rule: no goroutine is needed
		errs[parts[0]] = p.ask(ctx, parts[0])
		return errs
	}
	over := make(chan struct{})
	defer close(over)
	answers := s.askAll(ctx, parts, p, over)
	var enough <-chan time.Time
	for len(errs) < len(parts) {
		select {
		case a := <-answers:
			errs[a.part] = a.err
			if g.refuses(a.err) {
				return errs
			}
			if a.err == nil && enough == nil {
				timer := time.NewTimer(g.allowed(parts, errs, p.allowance))
				defer timer.Stop()
				enough = timer.C
			}
		case <-ctx.Done():
			return errs
		case <-enough:
			if !g.late(parts, errs, p.must) {
				return errs
			}
			enough = make(chan time.Time) // never
		}
	}
	return errs
}

type answer struct {
	part int
	err  error
}

// askAll asks parts at once. Their answers come from the channel until over is closed.
func (s *Service) askAll(ctx context.Context, parts []int, p polling, over <-chan struct{}) <-chan answer {
	answers := make(chan answer) // not buffered: who is not heard here is late
	for _, part := range parts {
		detached, done, err := s.strays.begin(ctx)
		ask := p.ask
		if err != nil {
			detached, done, ask = ctx, func() {}, func(context.Context, int) error { return err }
		}
		go func() {
			defer done()
			err := ask(detached, part)
			select {
			case answers <- answer{part, err}:
			case <-over:
				if p.late != nil {
					p.late(part, err)
				}
			}
		}()
	}
	return answers
}

// late notes the parts that have not answered in time, and tells whether one of them must
// be waited for.
func (g *group) late(parts []int, errs map[int]error, must func(part int) bool) (waits bool) {
	for _, part := range parts {
		if _, answered := errs[part]; !answered {
			g.parts[part].failing.Store(1)
			waits = waits || must != nil && must(part)
		}
	}
	return waits
}

// allowed is how long parts that have not answered yet are waited for: not for long where
// all of them were late, or away, the last time too.
func (g *group) allowed(parts []int, errs map[int]error, allowance time.Duration) time.Duration {
	for _, part := range parts {
		if _, answered := errs[part]; !answered && g.parts[part].failing.Load() == 0 {
			return allowance
		}
	}
	return min(allowance, hedgeAfter)
}

// race asks parts one after the other, the next when one fails or takes its time, until
// one has answered or refused the key. discard is given the results that come too late.
func race[T any](ctx context.Context, s *Service, g *group, parts []int, ask func(ctx context.Context, part int) (T, error), discard func(T)) (result T, by int, errs map[int]error) {
	if len(parts) == 1 {
		result, err := ask(ctx, parts[0])
		if err != nil {
			return result, -1, map[int]error{parts[0]: err}
		}
		return result, parts[0], nil
	}
	type answer struct {
		part   int
		result T
		err    error
	}
	bounded, cancel := context.WithCancel(ctx)
	defer cancel()
	answers, over := make(chan answer), make(chan struct{})
	defer close(over)
	errs = map[int]error{}
	asked := 0
	next := func() {
		if asked == len(parts) || ctx.Err() != nil {
			return
		}
		part := parts[asked]
		asked++
		_, done, err := s.strays.begin(ctx)
		if err != nil {
			errs[part] = err
			return
		}
		go func() {
			defer done()
			result, err := ask(bounded, part)
			select {
			case answers <- answer{part, result, err}:
			case <-over:
				discard(result)
			}
		}()
	}
	hedge := time.NewTicker(hedgeAfter)
	defer hedge.Stop()
	for next(); len(errs) < asked; {
		select {
		case a := <-answers:
			errs[a.part] = a.err
			if a.err == nil {
				return a.result, a.part, errs
			}
			if g.refuses(a.err) {
				return result, -1, errs
			}
			next()
		case <-hedge.C:
			next()
		}
	}
	return result, -1, errs
}

// question is what a part says yes or no to.
type question struct {
	version   string
	direction cache.Direction
}

// word is what a part answered to a call.
type word struct {
	err   error // nil is a yes
	began time.Time
	// told: the version's state says so, and takes it back; denied: nothing at all is told
	// of the wrapping key, until something is.
	told, denied bool
	// of is what it did not open; nil where that is not known.
	of *sealed
}

// no is a word that stands until a yes.
type no struct {
	at           time.Time // when it was heard
	told, denied bool
	of           *sealed
}

// said notes a part's word: a no stands until a yes to a later call, whatever else the cache
// covers with the same version. A no that upstream may have said for the sake of a context
// is none yet, and is not to be noted.
func (s *Service) said(w *wrapping, q question, said word) {
	class := plugins.ClassOf(said.err)
	if said.err != nil && (!class.Definite() || class == plugins.KeyNotFound) {
		return
	}
	if w.note(q, said) {
		s.refused(w, q)
	}
}

// note is said for the wrapping key alone. It tells whether this is news of a no.
func (w *wrapping) note(q question, said word) (news bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before, refused := w.noes[q]
	if said.err == nil {
		if said.began.After(w.yeses[q]) {
			w.yeses[q] = said.began
		}
		if refused && !said.began.Before(before.at) {
			delete(w.noes, q)
		}
		w.answered(said.began)
		return false
	}
	if said.began.Before(w.yeses[q]) {
		return false // it has said yes since
	}
	n := no{at: time.Now(), told: said.told, denied: said.denied, of: before.of}
	if refused && !before.denied && (said.denied || !before.told) {
		n.told, n.denied = before.told, false // that lasts longer
	}
	// What it has opened before is no forgery, and better to ask with.
	if said.of != nil && (n.of == nil || said.of.proven && !n.of.proven) {
		clone := said.of.clone()
		n.of = &clone
	}
	w.noes[q] = n
	return !refused
}

// allowed takes back what the backend told of versions that it now tells are enabled.
func (w *wrapping) allowed(d plugins.Description, began time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for q, n := range w.noes {
		v := findVersion(d, q.version)
		if (n.denied || n.told && v != nil && v.State == plugins.Enabled) && !began.Before(n.at) {
			delete(w.noes, q)
		}
	}
	w.answered(began)
}

// answered takes back a no to the question what the wrapping key is, which was heard before
// a call began that had a yes.
func (w *wrapping) answered(began time.Time) {
	if r := w.refused.Load(); r != nil && !began.Before(r.at) {
		w.refused.CompareAndSwap(r, nil)
	}
}

// refused suspends what a no covers beside that which was asked about: what others have
// wrapped too, and what it has not wrapped itself.
func (s *Service) refused(w *wrapping, q question) {
	g := w.group.Load()
	if g == nil || len(g.parts) == 1 {
		return
	}
	part := g.partOf(w.id.uri)
	current := ""
	if known := w.described.Load(); known != nil {
		current = known.Current
	}
	s.cache.Refuse(g.id.backend, g.id.uri, func(a cache.Authority) bool {
		v, err := g.parseVersions(a.Version)
		return err == nil && a.Direction == q.direction && (v[part] == q.version || v[part] == "" && current == q.version)
	}, s.now())
}

// refusedAll notes a no to everything that is known of the wrapping key.
func (w *wrapping) refusedAll(known *described, said word) {
	for _, v := range known.Versions {
		for _, d := range []cache.Direction{cache.Encrypt, cache.Decrypt} {
			w.note(question{v.Version, d}, said)
		}
	}
}

// refusedKey is what a version did not open when it refused, to ask with again.
func (w *wrapping) refusedKey(version string) *sealed {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.noes[question{version, cache.Decrypt}].of
}

// forgetRefused forgets it: it is not what the version has wrapped.
func (w *wrapping) forgetRefused(version string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n, ok := w.noes[question{version, cache.Decrypt}]; ok {
		n.of = nil
		w.noes[question{version, cache.Decrypt}] = n
	}
}

func (w *wrapping) refuses(version string, d cache.Direction) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, refused := w.noes[question{version, d}]
	return refused
}

// denied tells whether the backend, when it was asked last what the wrapping key is, said
// that this is nobody's business. That it does not have it is another matter.
func (w *wrapping) denied() bool {
	r := w.refused.Load()
	return r != nil && r.class != plugins.KeyNotFound
}

// withholds tells whether a part has refused a version and has not said yes since. What it
// has not wrapped, "", it would open under its current version; where nobody knows which
// that is, each no counts.
func (w *wrapping) withholds(version string, d cache.Direction) bool {
	if w.denied() {
		return true
	}
	if version != "" {
		return w.refuses(version, d)
	}
	if known := w.described.Load(); known != nil {
		return w.refuses(known.Current, d)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for q := range w.noes {
		if q.direction == d {
			return true
		}
	}
	return false
}

// inherit takes over what another wrapping of the same backend and URI has refused: that
// the configuration of the backend has changed is no yes.
func (w *wrapping) inherit(before *wrapping) {
	before.mu.Lock()
	noes := maps.Clone(before.noes)
	before.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.Copy(w.noes, noes)
	w.refused.Store(before.refused.Load())
}

// refusals are what is refused, for the store.
func (w *wrapping) refusals() []storedRefusal {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []storedRefusal
	for q, n := range w.noes {
		one := storedRefusal{Version: q.version, Direction: q.direction, Told: n.told, Denied: n.denied}
		if n.of != nil {
			of := n.of.stored()
			if text, err := json.Marshal(of); err == nil && len(text) <= maxRefused {
				one.Of = &of
			}
		}
		all = append(all, one)
	}
	return all
}

// refusedBefore takes in what was refused before a restart.
func (w *wrapping) refusedBefore(stored storedWrapping) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, one := range stored.Refused {
		n := no{at: time.Now(), told: one.Told, denied: one.Denied}
		if one.Of != nil {
			n.of = new(one.Of.sealed())
		}
		w.noes[question{one.Version, one.Direction}] = n
	}
	if stored.Denied {
		w.refused.CompareAndSwap(nil, &refusal{why: "before the restart", class: plugins.Denied, at: time.Now()})
	}
}

var errRefusedBefore = errors.New("until it does, or is taken out of the key's configuration, the key's other backends do not count")

// unrevoked returns an error, and has the cache suspend what it is about, where one of
// several parts has refused the key and has not said yes since: that another says yes
// proves nothing of it.
func (s *Service) unrevoked(g *group, a cache.Authority, v versions) error {
	if len(g.parts) == 1 {
		return nil
	}
	for part, version := range v {
		if w := g.parts[part]; w.withholds(version, a.Direction) {
			if s.inUse(g) {
				s.cache.Withhold(a)
			}
			return &Error{
				Reason: ReasonKeySuspended, Key: g.key, RetryAfter: time.Second,
				Message: "one of the key's backends has refused it and has not allowed it since; the others do not count until it does",
				Cause:   fmt.Errorf("backend %s refused %s (version %s) and has not said yes since: %w", w.id.backend, w.id.uri, cmp.Or(version, "-"), errRefusedBefore),
			}
		}
	}
	return nil
}
