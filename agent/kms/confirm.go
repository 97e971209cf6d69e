package kms

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// confirmGroup asks all parts that an authority names whether they still say yes. One that
// has not wrapped what is to be opened has a say in it too.
func (s *Service) confirmGroup(ctx context.Context, g *group, a cache.Authority, sample any) error {
	v, err := g.parseVersions(a.Version)
	if err != nil {
		return err
	}
	known := sealedOf(sample)
	var parts []int
	for part, version := range v {
		if version != "" || a.Direction == cache.Decrypt {
			parts = append(parts, part)
		}
	}
	began := s.now()
	errs := s.poll(ctx, g, parts, polling{
		allowance: confirmStragglers,
		// Of one that refused the key nobody knows more until it answers.
		must: func(part int) bool { return g.parts[part].withholds(v[part], a.Direction, a.Context) },
		ask: func(ctx context.Context, part int) error {
			switch {
			case a.Direction == cache.Encrypt:
				return s.confirmWrap(ctx, g.parts[part], v[part], a.Context, known)
			case len(g.parts) > 1 && g.parts[part].denied():
				// A question of its own: one that others wait for may have been answered with the
				// very no that is to be made sure of.
				if _, err := s.askForItself(ctx, g.parts[part]); err != nil {
					return err
				}
			}
			if v[part] == "" {
				return s.confirmAbsent(ctx, g.parts[part], a.Context)
			}
			return s.confirmUnwrap(ctx, g.parts[part], v[part], a.Context, known.of(part), len(g.parts) > 1)
		},
		late: func(_ int, err error) {
			if g.refuses(err) && s.inUse(g) {
				s.cache.Observe(a, cache.No, err, began)
			}
		},
	})
	err = cmp.Or(s.combine(g, errs), s.unrevoked(g, a, v))
	switch {
	case err == nil && a.Direction == cache.Encrypt:
		s.retireLacking(g, errs)
	case g.refuses(err):
		s.disbelieve(g)
	}
	return err
}

// opens asks a part to open something.
func (s *Service) opens(ctx context.Context, w *wrapping, probe sealed) error {
	material, err := s.unwrap(ctx, w, probe)
	clear(material)
	if probe.proven && plugins.ClassOf(err) == plugins.BadCiphertext {
		s.alarm("what opened before no longer opens: the wrapping key may have been replaced", err, w.id.backend, w.id.uri)
		return plugins.Errorf(plugins.Internal, "version %s of %s no longer opens what it opened before", probe.version, w.id.uri)
	}
	return err
}

// confirmUnwrap asks a part whether it opens what it has wrapped under a version: with the
// agent's own canary, or with what is to be confirmed where a context may decide.
func (s *Service) confirmUnwrap(ctx context.Context, w *wrapping, version, inContext string, sample *sealed, several bool) error {
	general := inContext == "" || !w.seesContext() // it may be asked with anything
	if canary, ok := w.canary(version); ok && general {
		return s.opens(ctx, w, canary)
	}
	var answer error
	if sample != nil {
		answer = s.opens(ctx, w, *sample)
		if answer == nil || sample.proven || !isWord(answer) {
			return answer
		}
	}
	// There is nothing to ask with, or it may be a forgery.
	clock := time.Now()
	d, err := s.askForItself(ctx, w)
	if err == nil {
		err = s.enabled(w, d.Description, version, clock)
	}
	switch class := plugins.ClassOf(err); {
	case class.Definite() && class != plugins.KeyNotFound:
		return err
	case general && s.makeCanary(ctx, w, version) == nil:
		return nil
	case plugins.ClassOf(answer).Definite():
		return answer
	case answer != nil && several:
		return s.confirmAbsent(ctx, w, inContext) // for all that is known, it has not wrapped this
	}
	return nothingAtHand(w, version, answer)
}

// isWord tells whether an error is what a backend says of the key, or of what it was given.
func isWord(err error) bool {
	class := plugins.ClassOf(err)
	return class.Definite() || class == plugins.BadCiphertext || class == plugins.Invalid
}

// confirmAbsent asks a part about what it has not wrapped: it would open that under its
// current version.
func (s *Service) confirmAbsent(ctx context.Context, w *wrapping, inContext string) error {
	known, err := s.absent(ctx, w)
	if err != nil {
		return err
	}
	if canary, ok := w.canary(known.Current); ok {
		return s.opens(ctx, w, canary)
	}
	for range maxAsked {
		q, refused, ok := w.askable(cache.Decrypt, inContext)
		if !ok {
			break
		}
		clock := time.Now()
		switch err = s.opens(ctx, w, refused); {
		case err != nil && !isWord(err):
			return err
		case !plugins.ClassOf(err).Definite():
			// It does not refuse that any more, even if it does not open it, as it is a forgery.
			s.unrefused(w, w.allows(q, clock, false))
		case !w.withholds("", cache.Decrypt, inContext): // it is a word on an old version by now
		case s.makeCanary(ctx, w, known.Current) == nil:
			return nil // it was a word on that alone
		default:
			return err
		}
	}
	if err := s.makeCanary(ctx, w, known.Current); err != nil { // whether it opens is not known then
		return plugins.Errorf(plugins.Unavailable, "the agent has nothing to ask backend %s with: %v", w.id.backend, err)
	}
	return nil
}

// maxAsked bounds how many noes a part is asked about at once.
const maxAsked = 4

// absent returns what is known of a part that has not wrapped what it is asked about. That
// its current version is not enabled is a no, once it has been asked for this.
func (s *Service) absent(ctx context.Context, w *wrapping) (*described, error) {
	known, began, clock := w.described.Load(), s.now(), time.Now()
	var err error
	switch {
	case known == nil:
		known, err = s.describePart(ctx, w, absentAge, false)
	case began-known.at > absentAge, w.withholds("", cache.Decrypt, ""):
		known, err = s.askForItself(ctx, w)
	}
	if err != nil {
		return nil, err
	}
	if v := findVersion(known.Description, known.Current); (v == nil || v.State != plugins.Enabled) && known.at < began {
		if known, err = s.askForItself(ctx, w); err != nil {
			return nil, err
		}
	}
	return known, s.enabled(w, known.Description, known.Current, clock)
}

// absentAge is how old the description may be of a part that has not wrapped what is asked
// about.
const absentAge = time.Minute

// sure asks all parts about an authority that one of them has refused: that another
// answers proves nothing.
func (s *Service) sure(ctx context.Context, g *group, a cache.Authority, sample sealedKey) error {
	if len(g.parts) == 1 || s.cache.Recheck(a) == nil {
		return nil
	}
	return s.confirmNow(ctx, g, a, sample)
}

// agreed makes sure that all parts have confirmed an authority no longer ago than maxAge:
// what one of them wraps or opens past the cache is no word of the others.
func (s *Service) agreed(ctx context.Context, g *group, a cache.Authority, sample sealedKey, maxAge time.Duration) error {
	if len(g.parts) == 1 {
		return nil
	}
	age, ok := s.cache.Confirmed(a)
	switch {
	case ok && age <= maxAge && s.cache.Recheck(a) == nil:
		return nil
	case a.Context != "":
		return s.usable(ctx, g, a, maxAge)
	}
	return s.confirmNow(ctx, g, a, sample)
}

// usable asks what all parts tell of the versions of an authority in a context: what policy
// says to that is each backend's own matter, for what it has wrapped.
func (s *Service) usable(ctx context.Context, g *group, a cache.Authority, maxAge time.Duration) error {
	v, err := g.parseVersions(a.Version)
	if err != nil {
		return err
	}
	parts := make([]int, len(g.parts))
	for part := range parts {
		parts[part] = part
	}
	errs := s.poll(ctx, g, parts, polling{
		allowance: hedgeAfter,
		ask: func(ctx context.Context, part int) error {
			w, clock := g.parts[part], time.Now()
			began := s.now()
			known, err := s.describePart(ctx, w, maxAge, false)
			if err != nil {
				return err
			}
			version := cmp.Or(v[part], known.Current)
			if v := findVersion(known.Description, version); v != nil && v.State != plugins.Enabled && known.at < began {
				if known, err = s.askForItself(ctx, w); err != nil {
					return err
				}
			}
			return s.enabled(w, known.Description, version, clock)
		},
	})
	for _, err := range errs {
		if g.refuses(err) {
			return err
		}
	}
	return s.unrevoked(g, a, v)
}

// confirmNow asks, unless the caller has just asked about what is refused: what is known of
// that is told, which is no new word of upstream's.
func (s *Service) confirmNow(ctx context.Context, g *group, a cache.Authority, sample sealedKey) error {
	if !s.cache.Turn(a, plugins.CallerFrom(ctx)) {
		if err := s.cache.Recheck(a); err != nil {
			return failure(ctx, g.key, err)
		}
	}
	began := s.now()
	err := s.confirmGroup(ctx, g, a, sample)
	s.observe(ctx, g, a, err, began)
	return err
}

// making is the attempt to make a canary.
type making struct {
	under bool
	ended time.Duration
	err   error // of the last one
}

const (
	// canaryPause is how long after an attempt that failed the next canary is made;
	// refusedPause where the backend said no, as to an agent that may only decrypt, and
	// nothing else waits for an answer.
	canaryPause  = 10 * time.Second
	refusedPause = 5 * time.Minute
)

// canary returns what a version can be asked with.
func (w *wrapping) canary(version string) (sealed, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c, ok := w.canaries[version]
	return c, ok && !w.dependsOnContext(c.binding) // that may be known since
}

// making returns an attempt that may begin now, or the error of the last one, or nothing
// where there is a canary.
func (w *wrapping) making(version string, now time.Duration) (*making, error) {
	withheld := w.withholds(version, cache.Decrypt, "")
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.canaries[version]; ok {
		return nil, nil //nolint:nilnil // nothing is to be made
	}
	m := w.makings[version]
	if m == nil {
		m = &making{err: errBeingMade, ended: longAgo}
		w.makings[version] = m
	}
	pause := canaryPause
	if plugins.ClassOf(m.err).Definite() && !withheld {
		pause = refusedPause
	}
	if m.under || m.ended != longAgo && now-m.ended < pause {
		return nil, m.err
	}
	m.under = true
	return m, nil
}

var errBeingMade = errors.New("its canary is being made")

// made ends an attempt.
func (w *wrapping) made(m *making, version string, canary sealed, now time.Duration, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.canaries[version] = canary
		delete(w.makings, version)
		return
	}
	m.under, m.err, m.ended = false, err, now
}

// makeCanary sees to it that a part can be asked about a version, whatever callers bring. A
// no is none to the key: that an agent may not wrap says nothing of what it may open. The
// error may be that of the last attempt.
func (s *Service) makeCanary(ctx context.Context, w *wrapping, version string) error {
	m, err := w.making(version, s.now())
	if m == nil {
		return err
	}
	return s.attempt(ctx, w, m, version)
}

// attempt makes a canary, or fails to, in an attempt that has begun.
func (s *Service) attempt(ctx context.Context, w *wrapping, m *making, version string) error {
	canary, err := s.wrapProbe(ctx, w, version, false, nil)
	w.made(m, version, canary, s.now(), err)
	return err
}

// leaveCanaries sees to it that each of several parts can be asked about what it has wrapped:
// exported data keys prove nothing of the key, as only a caller knows their context. Nobody
// waits for it.
func (s *Service) leaveCanaries(ctx context.Context, g *group, wrapped sealedKey) {
	if len(g.parts) == 1 {
		return // each unwrap is its own proof
	}
	for _, one := range wrapped {
		w := g.parts[one.part]
		m, _ := w.making(one.version, s.now())
		if m == nil {
			continue
		}
		detached, done, err := s.strays.begin(forAll(ctx))
		if err != nil {
			w.made(m, one.version, sealed{}, s.now(), err)
			continue
		}
		go func() {
			defer done()
			_ = s.attempt(detached, w, m, one.version) // the next wrap tries again
		}()
	}
}

// wrapProbe has random bytes of the agent's own wrapped, and opened.
func (s *Service) wrapProbe(ctx context.Context, w *wrapping, version string, bound bool, encryptionContext map[string]string) (canary sealed, err error) {
	material := make([]byte, envelope.DataKeySize)
	_, _ = rand.Read(material) // never fails: crypto/rand
	info := envelope.ProviderInfo{Purpose: envelope.PurposeProbe, Key: w.key, URI: w.id.uri, Version: version, ContextBound: bound}
	if info.Check, err = envelope.NewKeyCheck(material); err != nil {
		return sealed{}, err
	}
	return s.wrap(ctx, w, material, info, encryptionContext)
}

// confirm asks upstream whether it still says yes: with a canary of the
// agent's own where it has one. It is the cache's Confirm.
func (s *Service) confirm(ctx context.Context, a cache.Authority, sample any) error {
	s.mu.Lock()
	g := s.groups[wrappingID{backend: a.Backend, uri: a.WrappingKey}]
	s.mu.Unlock()
	if g == nil {
		return reconfigured(nil)
	}
	return s.confirmGroup(forAll(ctx), g, a, sample)
}

// confirmWrap asks a part whether it wraps under a version: in a context with that of what is
// to be confirmed.
func (s *Service) confirmWrap(ctx context.Context, w *wrapping, version, inContext string, sample sealedKey) error {
	// Not the question that others wait for: a no to that one may be what has to
	// be made sure of.
	clock := time.Now()
	d, err := s.askForItself(ctx, w)
	if err != nil {
		return err
	}
	if err := s.enabled(w, d.Description, version, clock); err != nil {
		return err
	}
	var pairs map[string]string
	switch {
	case inContext == "":
	case len(sample) == 0:
		return nothingAtHand(w, version, nil)
	default:
		pairs = sample[0].binding.Context
	}
	began := time.Now()
	canary, err := s.wrapProbe(ctx, w, version, inContext != "", pairs)
	if err != nil {
		s.said(w, version, cache.Encrypt, plugins.Binding{ContextBound: inContext != ""}, word{err: err, began: began})
		return err
	}
	if !w.dependsOnContext(canary.binding) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.canaries[version] = canary
	}
	return nil
}

// enabled returns the no that it is, to both directions, where a version is not enabled by
// the answer to a question that was asked then.
func (s *Service) enabled(w *wrapping, d plugins.Description, version string, began time.Time) error {
	v := findVersion(d, version)
	if v == nil {
		return plugins.Errorf(plugins.KeyNotFound, "%s has no version %q", w.id.uri, version)
	}
	if v.State == plugins.Enabled {
		return nil
	}
	err := plugins.Errorf(plugins.KeyUnusable, "version %s of %s is %s", version, w.id.uri, v.State)
	for _, direction := range []cache.Direction{cache.Encrypt, cache.Decrypt} {
		s.said(w, version, direction, plugins.Binding{}, word{err: err, began: began, told: true})
	}
	return err
}

// nothingAtHand says that a version cannot be asked about. Upstream has said nothing,
// which is no outage.
func nothingAtHand(w *wrapping, version string, err error) error {
	return &Error{
		Reason: ReasonKeySuspended, Key: w.key, RetryAfter: time.Second,
		Message: "the agent has nothing at hand to ask the backend with whether it still allows this key; retry",
		Cause:   fmt.Errorf("nothing at hand to prove version %s of %s with: %w", version, w.id.uri, cmp.Or(err, errNoSample)),
	}
}

var errNoSample = errors.New("nothing of it was opened yet")
