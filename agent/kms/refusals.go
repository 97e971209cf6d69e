package kms

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/plugins"
)

// question is what a part says yes or no to.
type question struct {
	version   string
	direction cache.Direction
	// unbound: it is about what is bound to no context alone, of a backend whose policy
	// sees contexts.
	unbound bool
}

// word is what a part answered to a call.
type word struct {
	err   error // nil is a yes
	began time.Time
	// told: the version's state says so, and takes it back.
	told bool
	// of is what it did not open; nil where that is not known.
	of *sealed
}

// no is a word that stands until a yes.
type no struct {
	at   time.Time // when it was heard
	told bool
	// policy: upstream's policy said so, which is a word on other versions too.
	policy bool
	// acted: what had to be destroyed because of it is.
	acted bool
	of    *sealed
}

// refusal is a definite no to the question what the wrapping key is.
type refusal struct {
	why   string
	class plugins.Class
	at    time.Time
}

// verdicts are what the backend of a wrapping key has said no to, and not taken back. They
// outlive the configuration: a call that began under another one is heard too.
type verdicts struct {
	refused atomic.Pointer[refusal] // nil where the last question was not answered by a definite no
	// seen: its policy sees contexts, or did when that was known last.
	seen atomic.Bool

	mu    sync.Mutex // guards noes and yeses
	noes  map[question]no
	yeses map[question]time.Time // when the last call began that it said yes to, with no context that it sees
	// current is the version that was the current one when that was told last, at told.
	current string
	toldAt  time.Time
}

func newVerdicts() *verdicts {
	return &verdicts{noes: map[question]no{}, yeses: map[question]time.Time{}}
}

// said notes a part's word on a version, in a call with that binding: a no stands until a
// yes to a later call, whatever else the cache covers with the same version. What policy
// says to a context that it sees is a word on that context alone, and none on the key.
func (s *Service) said(w *wrapping, version string, d cache.Direction, b plugins.Binding, said word) {
	class, sees := plugins.ClassOf(said.err), w.seesContext()
	q := question{version, d, sees && class == plugins.Denied}
	switch {
	case said.err == nil:
		changed := w.allows(question{version, d, false}, said.began, !sees || !b.ContextBound)
		if sees && !b.ContextBound {
			changed = w.allows(question{version, d, true}, said.began, true) || changed
		}
		s.unrefused(w, changed)
	case !class.Definite() || class == plugins.KeyNotFound || q.unbound && b.ContextBound:
	case w.notes(q, said):
		s.refused(w, q, said)
	}
}

// unrefused has it saved that something was taken back.
func (s *Service) unrefused(w *wrapping, changed bool) {
	if g := w.group.Load(); changed && g != nil && len(g.parts) > 1 {
		s.cache.NotesChanged(false)
	}
}

// allows notes a yes; general: no context was seen that it may depend on. It tells whether
// it takes something back.
func (v *verdicts) allows(q question, began time.Time, general bool) (changed bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if general && began.After(v.yeses[q]) {
		v.yeses[q] = began
	}
	if n, refused := v.noes[q]; refused && !began.Before(n.at) {
		delete(v.noes, q)
		changed = true
	}
	return v.answered(began) || changed
}

// notes notes a no. It tells whether that is news.
func (v *verdicts) notes(q question, said word) (news bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	before, refused := v.noes[q]
	// That a version may not be used is said to a use where policy has nothing against it.
	policy := plugins.ClassOf(said.err) == plugins.Denied || said.told && before.policy
	n := no{at: time.Now(), told: said.told && (!refused || before.told), policy: policy, acted: before.acted, of: before.of}
	// What it has opened before is no forgery, and better to ask with.
	if said.of != nil && (n.of == nil || said.of.proven && !n.of.proven) {
		clone := said.of.clone()
		n.of = &clone
	}
	v.noes[q] = n
	return !refused || n.policy && !before.policy
}

// told takes back what the backend told of versions that it now tells are enabled. It
// tells whether there was such.
func (v *verdicts) told(d plugins.Description, began time.Time) (changed bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !began.Before(v.toldAt) { // else it is an older answer that has come late
		v.current, v.toldAt = d.Current, began
	}
	for q, n := range v.noes {
		one := findVersion(d, q.version)
		if n.told && one != nil && one.State == plugins.Enabled && !began.Before(n.at) {
			delete(v.noes, q)
			changed = true
		}
	}
	return v.answered(began) || changed
}

// answered takes back a no to the question what the wrapping key is, which was heard before
// a call began that had a yes.
func (v *verdicts) answered(began time.Time) (changed bool) {
	r := v.refused.Load()
	return r != nil && !began.Before(r.at) && v.refused.CompareAndSwap(r, nil)
}

// refused suspends what a no covers beside that which was asked about: what others have
// wrapped too, and what it has not wrapped itself.
func (s *Service) refused(w *wrapping, q question, said word) {
	g := w.group.Load()
	if g == nil || len(g.parts) == 1 {
		return
	}
	part := g.partOf(w.id.uri)
	s.cache.Refuse(g.id.backend, g.id.uri, func(a cache.Authority) bool {
		if a.Direction != q.direction || q.unbound && a.Context != "" {
			return false
		}
		v, err := g.parseVersions(a.Version)
		return err == nil && w.withholds(v[part], q.direction, a.Context)
	}, said.err, s.now()-time.Since(said.began))
	if plugins.ClassOf(said.err) != plugins.Denied { // that is made sure of first: it may be said to a forgery
		s.disbelieve(g)
	}
	s.cache.NotesChanged(true)
}

// disbelieve destroys what is cached of which is not known that a part has wrapped it, where
// that part refuses what it has not: whoever asked for it may only have said so.
func (s *Service) disbelieve(g *group) {
	if !s.inUse(g) {
		return // what has taken its place will
	}
	for part, w := range g.parts {
		if len(g.parts) > 1 && w.toAct() {
			s.cache.EvictOrigins(g.id.backend, g.id.uri, func(origin any) bool {
				of := sealedOf(origin).of(part)
				return of != nil && !of.proven
			})
		}
	}
}

// refuses tells whether a version has been refused by itself, where no context is seen.
func (v *verdicts) refuses(version string, d cache.Direction) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, refused := v.noes[question{version, d, false}]
	_, unbound := v.noes[question{version, d, true}]
	return refused || unbound
}

// denied tells whether the backend, when it was asked last what the wrapping key is, said
// that this is nobody's business. That it does not have it is another matter.
func (v *verdicts) denied() bool {
	r := v.refused.Load()
	return r != nil && r.class != plugins.KeyNotFound
}

// withholds tells whether a part has refused a version and has not said yes since. What it
// has not wrapped, "", it would open under its current version; where nobody knows which
// that is, each no counts.
func (v *verdicts) withholds(version string, d cache.Direction, inContext string) bool {
	if v.denied() {
		return true
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	_, _, found := v.standing(version, d, inContext)
	return found
}

// standing returns a no that concerns a version, "" is what a part has not wrapped; one that
// can be asked about, if there is one. It requires v.mu.
func (v *verdicts) standing(version string, d cache.Direction, inContext string) (q question, n no, found bool) {
	if len(v.noes) == 0 {
		return q, n, false
	}
	for question, one := range v.noes {
		if v.concerns(version, d, inContext, question, one) && (!found || n.of == nil && one.of != nil) {
			q, n, found = question, one, true
		}
	}
	return q, n, found
}

// concerns tells whether a no is one to a version. It requires v.mu.
func (v *verdicts) concerns(version string, d cache.Direction, inContext string, q question, n no) bool {
	if q.direction != d || q.unbound && inContext != "" {
		return false
	}
	version = cmp.Or(version, v.current)
	return version == "" || q.version == version || v.alsoOf(version, q, n)
}

// alsoOf tells whether a no to one version is one to another: where policy said so, until it
// has said yes to that one. It requires v.mu.
func (v *verdicts) alsoOf(version string, q question, n no) bool {
	q.version = version
	return n.policy && v.yeses[q].Before(n.at)
}

// toAct tells whether there is a no to what has not been wrapped that nobody has acted on.
func (v *verdicts) toAct() (found bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for q, n := range v.noes {
		if v.concerns("", cache.Decrypt, "", q, n) && !n.acted {
			n.acted, found = true, true
			v.noes[q] = n
		}
	}
	return found
}

// askable returns a no that concerns what a part has not wrapped, with what it did not open.
func (v *verdicts) askable(d cache.Direction, inContext string) (question, sealed, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	q, n, found := v.standing("", d, inContext)
	if !found || n.of == nil {
		return question{}, sealed{}, false
	}
	return q, *n.of, true
}

// lastCurrent is the version that was the current one when that was told last.
func (v *verdicts) lastCurrent() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.current
}

// refusals are what is refused, for the store.
func (v *verdicts) refusals() []storedRefusal {
	v.mu.Lock()
	defer v.mu.Unlock()
	var all []storedRefusal
	for q, n := range v.noes {
		one := storedRefusal{
			Version: q.version, Direction: q.direction, Unbound: q.unbound, Told: n.told,
			Policy: n.policy && (v.current == "" || q.version == v.current || v.alsoOf(v.current, q, n)),
		}
		if n.of != nil {
			one.Of = n.of.storedSmall()
		}
		all = append(all, one)
	}
	return all
}

// storedSmall is stored where that is no more than maxProbe bytes, else nil.
func (k sealed) storedSmall() *storedEDK {
	stored := k.stored()
	if text, err := json.Marshal(stored); err != nil || len(text) > maxProbe {
		return nil
	}
	return &stored
}

// refusedBefore takes in what was refused before a restart.
func (v *verdicts) refusedBefore(stored storedWrapping) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, one := range stored.Refused {
		n := no{at: time.Now(), told: one.Told, policy: one.Policy}
		if one.Of != nil {
			n.of = new(one.Of.sealed())
		}
		v.noes[question{one.Version, one.Direction, one.Unbound}] = n
	}
	v.seen.Store(v.seen.Load() || stored.SeesContext)
	v.current = cmp.Or(v.current, stored.Current, stored.Last)
	if stored.Denied {
		v.refused.CompareAndSwap(nil, &refusal{why: "before the restart", class: plugins.Denied, at: time.Now()})
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
		w := g.parts[part]
		if !w.withholds(version, a.Direction, a.Context) {
			continue
		}
		err := s.suspended(g, part, version)
		if s.inUse(g) {
			s.cache.Withhold(a, err.Cause)
		}
		return err
	}
	return nil
}

// suspended says that a part has refused a version before.
func (s *Service) suspended(g *group, part int, version string) *Error {
	w := g.parts[part]
	return &Error{
		Reason: ReasonKeySuspended, Key: g.key, RetryAfter: time.Second,
		Message: "one of the key's backends has refused it and has not allowed it since; the others do not count until it does",
		Cause:   fmt.Errorf("backend %s refused %s (version %s) and has not said yes since: %w", w.id.backend, w.id.uri, cmp.Or(version, "-"), errRefusedBefore),
	}
}
