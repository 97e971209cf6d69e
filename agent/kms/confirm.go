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

// confirmGroup asks all parts that an authority names whether they still say yes.
func (s *Service) confirmGroup(ctx context.Context, g *group, a cache.Authority, sample any) error {
	v, err := g.parseVersions(a.Version)
	if err != nil {
		return err
	}
	known := sealedOf(sample)
	var parts []int
	for part, version := range v {
		// One that has not wrapped this has a say too, where there is something to ask it.
		if version == "" && a.Direction == cache.Decrypt {
			v[part] = g.parts[part].provable()
		}
		if v[part] != "" {
			parts = append(parts, part)
		}
	}
	began := s.now()
	errs := s.poll(ctx, g, parts, polling{
		allowance: confirmStragglers,
		// Of one that refused the key nobody knows more until it answers.
		must: func(part int) bool { return g.parts[part].refuses(v[part], a.Direction) },
		ask: func(ctx context.Context, part int) error {
			if a.Direction == cache.Encrypt {
				return s.confirmWrap(ctx, g.parts[part], v[part])
			}
			return s.confirmUnwrap(ctx, g.parts[part], v[part], known.of(part))
		},
		late: func(_ int, err error) {
			if g.refuses(err) && s.inUse(g) {
				s.cache.Observe(a, cache.No, began)
			}
		},
	})
	if err = cmp.Or(s.combine(g, errs), g.unrevoked(v, a.Direction)); err == nil && a.Direction == cache.Encrypt {
		s.retireLacking(g, errs)
	}
	return err
}

// provable returns the current version where there is a canary to prove it with.
func (w *wrapping) provable() string {
	d := w.described.Load()
	if d == nil {
		return ""
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.canaries[d.Current]; !ok {
		return ""
	}
	return d.Current
}

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
	err := s.confirmGroup(ctx, g, a, sample)
	s.observe(ctx, g, a, err, began)
	return err
}

// leaveCanaries sees to it that each of several parts can be asked about what it has wrapped,
// whatever callers bring: exported data keys prove nothing of the key, as only a caller
// knows their context. Nobody waits for it.
func (s *Service) leaveCanaries(ctx context.Context, g *group, wrapped sealedKey) {
	if len(g.parts) == 1 {
		return // each unwrap is its own proof
	}
	for _, one := range wrapped {
		w := g.parts[one.part]
		w.mu.Lock()
		_, ok := w.canaries[one.version]
		w.mu.Unlock()
		if ok {
			continue
		}
		detached, done, err := s.strays.begin(forAll(ctx))
		if err != nil {
			return
		}
		go func() {
			defer done()
			_, _, _ = w.flight.Do("canary "+one.version, func() (any, error) { // the next wrap tries again
				return nil, s.confirmWrap(detached, w, one.version)
			})
		}()
	}
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
	d, err := s.askForItself(ctx, w)
	if err != nil {
		return err
	}
	v := findVersion(d.Description, version)
	if v == nil {
		return plugins.Errorf(plugins.KeyNotFound, "%s has no version %q", w.id.uri, version)
	}
	if v.State != plugins.Enabled {
		err := plugins.Errorf(plugins.KeyUnusable, "version %s of %s is %s", version, w.id.uri, v.State)
		w.said(question{version, cache.Encrypt}, plugins.Binding{}, err, time.Now())
		return err
	}
	var material [envelope.DataKeySize]byte
	_, _ = rand.Read(material[:]) // never fails: crypto/rand
	info := envelope.ProviderInfo{Purpose: envelope.PurposeProbe, Key: w.key, URI: w.id.uri, Version: version}
	canary, err := s.wrap(ctx, w, material[:], info, nil)
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.canaries[version] = canary
	w.mu.Unlock()
	return nil
}

func (s *Service) confirmUnwrap(ctx context.Context, w *wrapping, version string, sample *sealed) error {
	w.mu.Lock()
	probe, ok := w.canaries[version]
	w.mu.Unlock()
	switch {
	case ok:
	case sample == nil:
		return nothingAtHand(w, version, nil)
	default:
		probe = *sample
	}
	material, err := w.unwrap(ctx, probe)
	clear(material)
	class := plugins.ClassOf(err)
	switch {
	case err == nil:
		return nil
	case !probe.proven && (class == plugins.BadCiphertext || class.Definite() && probe.binding.ContextBound):
		return nothingAtHand(w, version, err) // a caller may have made it up, or its context
	case class == plugins.BadCiphertext:
		s.alarm("what opened before no longer opens: the wrapping key may have been replaced", err, w.id.backend, w.id.uri)
		return plugins.Errorf(plugins.Internal, "version %s of %s no longer opens what it opened before", version, w.id.uri)
	}
	return err
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
