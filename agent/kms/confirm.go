package kms

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
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
		must: func(part int) bool { return g.parts[part].withholds(v[part], a.Direction) },
		ask: func(ctx context.Context, part int) error {
			if a.Direction == cache.Encrypt {
				return s.confirmWrap(ctx, g.parts[part], v[part])
			}
			return s.confirmOpening(ctx, g, g.parts[part], v[part], known.of(part))
		},
		late: func(_ int, err error) {
			if g.refuses(err) && s.inUse(g) {
				s.cache.Observe(a, cache.No, began)
			}
		},
	})
	if err = cmp.Or(s.combine(g, errs), s.unrevoked(g, a, v)); err == nil && a.Direction == cache.Encrypt {
		s.retireLacking(g, errs)
	}
	return err
}

// confirmOpening asks a part whether it opens what was wrapped under a version of its own;
// "" is what it has not wrapped.
func (s *Service) confirmOpening(ctx context.Context, g *group, w *wrapping, version string, sample *sealed) error {
	if len(g.parts) > 1 && w.denied() {
		// A question of its own: one that others wait for may have been answered with the
		// very no that is to be made sure of.
		if _, err := s.askForItself(ctx, w); err != nil {
			return err
		}
	}
	if version != "" {
		return s.confirmUnwrap(ctx, w, version, sample)
	}
	known, err := s.absent(ctx, w)
	if err != nil {
		return err
	}
	if _, ok := w.canary(known.Current); ok {
		return s.confirmUnwrap(ctx, w, known.Current, nil)
	}
	if refused := w.refusedKey(known.Current); refused != nil {
		material, err := s.unwrap(ctx, w, *refused)
		clear(material)
		switch class := plugins.ClassOf(err); {
		case class == plugins.BadCiphertext || class == plugins.Invalid:
			w.forgetRefused(known.Current) // it never was the key's
		case class.Definite() && refused.binding.ContextBound:
			return s.conclude(ctx, w, *refused, err)
		default:
			return err
		}
	}
	if _, ok := w.witness(known.Current); ok {
		return s.confirmUnwrap(ctx, w, known.Current, nil)
	}
	if err := s.makeCanary(ctx, w, known.Current); err != nil { // whether it opens is not known then
		return plugins.Errorf(plugins.Unavailable, "the agent has nothing to ask backend %s with: %v", w.id.backend, err)
	}
	return nil
}

// absent returns what is known of a part that has not wrapped what it is asked about. That
// its current version is not enabled is a no, once it has been asked for this.
func (s *Service) absent(ctx context.Context, w *wrapping) (*described, error) {
	known, began, clock := w.described.Load(), s.now(), time.Now()
	var err error
	switch {
	case known == nil:
		known, err = s.describePart(ctx, w, absentAge, false)
	case began-known.at > absentAge, w.withholds("", cache.Decrypt):
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
	return known, s.enabled(w, known, known.Current, clock)
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
	if ok && age <= maxAge && s.cache.Recheck(a) == nil {
		return nil
	}
	return s.confirmNow(ctx, g, a, sample)
}

func (s *Service) confirmNow(ctx context.Context, g *group, a cache.Authority, sample sealedKey) error {
	began := s.now()
	if last := g.sureAt.Load(); last != 0 && began-time.Duration(last) < surePause {
		if err := s.cache.Recheck(a); err != nil {
			return err // somebody has asked just now
		}
	}
	g.sureAt.Store(int64(began))
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
	return c, ok
}

// making returns an attempt that may begin now, or the error of the last one, or nothing
// where there is a canary.
func (w *wrapping) making(version string, now time.Duration) (*making, error) {
	withheld := w.withholds(version, cache.Decrypt)
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
	canary, err := s.wrapProbe(ctx, w, version)
	w.made(m, version, canary, s.now(), err)
	return err
}

// surePause is how often who waits may ask about what is suspended.
const surePause = time.Second

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
func (s *Service) wrapProbe(ctx context.Context, w *wrapping, version string) (canary sealed, err error) {
	material := make([]byte, envelope.DataKeySize)
	_, _ = rand.Read(material) // never fails: crypto/rand
	info := envelope.ProviderInfo{Purpose: envelope.PurposeProbe, Key: w.key, URI: w.id.uri, Version: version}
	if info.Check, err = envelope.NewKeyCheck(material); err != nil {
		return sealed{}, err
	}
	return s.wrap(ctx, w, material, info, nil)
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

func (s *Service) confirmWrap(ctx context.Context, w *wrapping, version string) error {
	// Not the question that others wait for: a no to that one may be what has to
	// be made sure of.
	clock := time.Now()
	d, err := s.askForItself(ctx, w)
	if err != nil {
		return err
	}
	if err := s.enabled(w, d, version, clock); err != nil {
		return err
	}
	began := time.Now()
	canary, err := s.wrapProbe(ctx, w, version)
	if err != nil {
		s.said(w, question{version, cache.Encrypt}, word{err: err, began: began})
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.canaries[version] = canary
	return nil
}

// enabled returns the no that it is, to both directions, where a version is not enabled by
// the answer to a question that was asked then.
func (s *Service) enabled(w *wrapping, d *described, version string, began time.Time) error {
	v := findVersion(d.Description, version)
	if v == nil {
		return plugins.Errorf(plugins.KeyNotFound, "%s has no version %q", w.id.uri, version)
	}
	if v.State == plugins.Enabled {
		return nil
	}
	err := plugins.Errorf(plugins.KeyUnusable, "version %s of %s is %s", version, w.id.uri, v.State)
	for _, direction := range []cache.Direction{cache.Encrypt, cache.Decrypt} {
		s.said(w, question{version, direction}, word{err: err, began: began, told: true})
	}
	return err
}

func (s *Service) confirmUnwrap(ctx context.Context, w *wrapping, version string, sample *sealed) error {
	probe, ok := w.canary(version)
	if !ok {
		probe, ok = w.witness(version)
	}
	switch {
	case ok:
	case sample == nil, w.isTainted(*sample, s.now()):
		return nothingAtHand(w, version, nil)
	default:
		probe = *sample
	}
	material, err := s.unwrap(ctx, w, probe)
	clear(material)
	class := plugins.ClassOf(err)
	switch {
	case err == nil:
		return nil
	case !probe.proven && class == plugins.BadCiphertext:
		return nothingAtHand(w, version, err) // a caller may have made it up
	case class.Definite() && probe.binding.ContextBound:
		return s.conclude(ctx, w, probe, err)
	case class == plugins.BadCiphertext:
		s.alarm("what opened before no longer opens: the wrapping key may have been replaced", err, w.id.backend, w.id.uri)
		return plugins.Errorf(plugins.Internal, "version %s of %s no longer opens what it opened before", version, w.id.uri)
	}
	return err
}

// conclude finds out what a no means that upstream may have said for the sake of a context,
// which a caller may have made up: by what upstream tells of the version, and by a canary.
func (s *Service) conclude(ctx context.Context, w *wrapping, refused sealed, answer error) error {
	clock := time.Now()
	d, err := s.askForItself(ctx, w)
	if err == nil {
		err = s.enabled(w, d, refused.version, clock)
	}
	if class := plugins.ClassOf(err); class.Definite() && class != plugins.KeyNotFound {
		return err
	}
	if err = s.makeCanary(ctx, w, refused.version); err == nil {
		return nil // it opens, without a context
	}
	w.taint(refused, s.now())
	return nothingAtHand(w, refused.version, answer)
}

// witness returns what a version has opened with a context.
func (w *wrapping) witness(version string) (sealed, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	k, ok := w.witnesses[version]
	return k, ok
}

// taint remembers what is not to be asked with again, nor to witness.
func (w *wrapping) taint(k sealed, now time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tainted[k.version] = tainted{ciphertext: sha256.Sum256(k.edk.Ciphertext), at: now}
	delete(w.witnesses, k.version)
}

func (w *wrapping) isTainted(k sealed, now time.Duration) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	t, ok := w.tainted[k.version]
	return ok && now-t.at < refusedPause && t.ciphertext == sha256.Sum256(k.edk.Ciphertext)
}

// inconclusive tells of a no that may have been said for the sake of a context. Who waits for
// it is not served on another's yes, and nothing else comes of it.
func inconclusive(err error) bool {
	var own *Error
	class := plugins.ClassOf(err)
	return errors.As(err, &own) && class.Definite() && class != plugins.KeyNotFound
}

// nothingAtHand says that a version cannot be asked about. Upstream has said nothing,
// which is no outage.
func nothingAtHand(w *wrapping, version string, err error) error {
	message := "the agent has nothing at hand to ask the backend with whether it still allows this key; retry"
	if plugins.ClassOf(err).Definite() {
		message = "a backend refuses what it was asked to open, and the agent has nothing else at hand to learn whether it refuses the key; " +
			"retry, and if it stays so have the key looked at upstream"
	}
	return &Error{
		Reason: ReasonKeySuspended, Key: w.key, RetryAfter: time.Second, Message: message,
		Cause: fmt.Errorf("nothing at hand to prove version %s of %s with: %w", version, w.id.uri, cmp.Or(err, errNoSample)),
	}
}

var errNoSample = errors.New("nothing of it was opened yet")
