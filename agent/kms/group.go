package kms

import (
	"cmp"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// group is the wrapping keys of one logical key, each in a backend of its own, in the
// order of the configuration. For the cache it is one upstream: whichever answers is
// good enough to open a data key, and all that answer wrap a new one. It lives as long
// as the configuration names the same ones.
type group struct {
	id    wrappingID // of all of them
	key   string
	parts []*wrapping
	// least is how many must wrap a data key.
	least int
	// lacking: data keys in use, or spares, miss a wrap.
	lacking   atomic.Bool
	attention attention
}

func newGroup(key string, parts []*wrapping, least int) *group {
	g := &group{key: key, parts: parts, least: max(1, least)}
	names, uris := make([]string, len(parts)), make([]string, len(parts))
	for i, w := range parts {
		names[i], uris[i] = w.id.backend, w.id.uri
	}
	g.id = wrappingID{backend: strings.Join(names, "+"), uri: strings.Join(uris, " ")} // neither has them in it
	return g
}

// same tells whether g is what a configuration asks for.
func (g *group) same(parts []*wrapping, least int) bool {
	return g != nil && g.least == max(1, least) && slices.Equal(g.parts, parts)
}

// versions are those of the parts of a group, in their order; "" where a part has
// none, or none that is known.
type versions []string

// String is what people read: "3", or "3,1,-" for three parts.
func (v versions) String() string {
	shown := slices.Clone(v)
	for i, s := range shown {
		if s == "" {
			shown[i] = "-"
		}
	}
	return strings.Join(shown, ",")
}

// name stands for the versions in a cache.Authority.
func (v versions) name() string {
	if len(v) == 1 {
		return v[0]
	}
	b, _ := json.Marshal([]string(v)) // never fails: strings
	return string(b)
}

// parseVersions undoes name.
func (g *group) parseVersions(name string) (versions, error) {
	if len(g.parts) == 1 {
		return versions{name}, nil
	}
	var v versions
	if err := json.Unmarshal([]byte(name), &v); err != nil || len(v) != len(g.parts) {
		return nil, plugins.Errorf(plugins.KeyNotFound, "key %s has no versions %q", g.key, name)
	}
	return v, nil
}

func (g *group) authority(v versions, d cache.Direction) cache.Authority {
	return cache.Authority{Backend: g.id.backend, WrappingKey: g.id.uri, Version: v.name(), Direction: d}
}

// authorityIn is the authority of what is bound to a context, where bound says so.
func (g *group) authorityIn(v versions, d cache.Direction, bound bool, encryptionContext map[string]string) cache.Authority {
	a := g.authority(v, d)
	if bound && slices.ContainsFunc(g.parts, (*wrapping).seesContext) {
		a.Context = contextName(encryptionContext)
	}
	return a
}

// authorityOf is the authority that opens EDKs.
func (g *group) authorityOf(k sealedKey) cache.Authority {
	for _, one := range k {
		if one.binding.ContextBound {
			return g.authorityIn(g.versions(k), cache.Decrypt, true, one.binding.Context)
		}
	}
	return g.authority(g.versions(k), cache.Decrypt)
}

// sealedKey is one data key, wrapped by some parts of a group: no two elements are of
// the same part, and they stand in the order of the parts.
type sealedKey []sealed

// made is a data key for messages as the cache keeps it: what each message says of it
// is made once.
type made struct {
	sealedKey

	edks    []envelope.EDK
	version string
	wraps   string // for the census
}

func (g *group) made(k sealedKey) *made {
	m := &made{sealedKey: k, version: g.versions(k).String(), wraps: g.wraps(k), edks: make([]envelope.EDK, len(k))}
	for i, s := range k {
		m.edks[i] = s.edk
	}
	return m
}

// wraps says which parts have wrapped a data key, and under which versions.
func (g *group) wraps(k sealedKey) string {
	names := make([]string, len(k))
	for i, s := range k {
		names[i] = g.parts[s.part].id.backend + "@" + s.version
	}
	return strings.Join(names, " ")
}

// sealedOf returns the EDKs behind an origin, of whichever direction.
func sealedOf(origin any) sealedKey {
	switch o := origin.(type) {
	case *made:
		return o.sealedKey
	case sealedKey:
		return o
	}
	return nil
}

// versions returns those of the parts that wrapped the data key.
func (g *group) versions(k sealedKey) versions {
	v := make(versions, len(g.parts))
	for _, s := range k {
		v[s.part] = s.version
	}
	return v
}

// partOf returns the index of the part that a URI names; -1 where none does.
func (g *group) partOf(uri string) int {
	return slices.IndexFunc(g.parts, func(w *wrapping) bool { return w.id.uri == uri })
}

// combine makes one answer of those of several backends. That one of them denies the
// key, or has it disabled, is a no. That one does not have it is a fault to report, and
// a no where nobody has it who answers. One yes is a yes; what else there is counts
// where nobody has said more.
func (s *Service) combine(g *group, errs map[int]error) error {
	var missing, other error
	yes := false
	for part := range g.parts {
		err, asked := errs[part]
		switch {
		case !asked:
		case err == nil:
			yes = true
		case errors.As(err, new(*Error)):
			other = cmp.Or(other, err)
		case plugins.ClassOf(err) == plugins.KeyNotFound:
			missing = err
			if len(g.parts) > 1 && g.parts[part].missing.CompareAndSwap(false, true) {
				s.alarm("one of the backends of a key does not have it", err, g.parts[part].id.backend, g.parts[part].id.uri)
			}
		case verdictOf(err) == cache.No:
			return err
		case other == nil || plugins.ClassOf(other) == plugins.BadCiphertext:
			other = err
		}
	}
	switch {
	case yes:
		return nil
	case other != nil:
		return other
	case missing != nil:
		return missing
	}
	return plugins.Errorf(plugins.Unavailable, "none of the backends of key %s has answered", g.key)
}

// wrapGroup has a data key wrapped, and proven, by every part that answers, and by as
// many as must at least.
func (s *Service) wrapGroup(ctx context.Context, g *group, v versions, material []byte, info envelope.ProviderInfo, encryptionContext map[string]string) (sealedKey, error) {
	var parts []int
	for part, version := range v {
		if version != "" {
			parts = append(parts, part)
		}
	}
	made, errs := s.wrapParts(ctx, g, parts, v, material, info, encryptionContext)
	a := g.authorityIn(v, cache.Encrypt, info.ContextBound, encryptionContext)
	switch err := cmp.Or(s.combine(g, errs), s.unrevoked(g, a, v)); {
	case err != nil:
		return nil, err
	case len(made) < g.least:
		return nil, plugins.Errorf(plugins.Unavailable, "%d of the %d backends of key %s have wrapped, and min_wraps is %d", len(made), len(g.parts), g.key, g.least)
	}
	return made, nil
}

// wrapParts asks the parts at once. Those that are late when enough others have
// answered are not waited for.
func (s *Service) wrapParts(ctx context.Context, g *group, parts []int, v versions, material []byte, info envelope.ProviderInfo, encryptionContext map[string]string) (sealedKey, map[int]error) {
	type answer struct {
		part int
		made sealed
		err  error
	}
	wrapBy := func(ctx context.Context, part int) (sealed, error) {
		one := info
		one.URI, one.Version = g.parts[part].id.uri, v[part]
		began := time.Now()
		made, err := s.wrap(ctx, g.parts[part], material, one, encryptionContext)
		made.part = part
		if err != nil {
			s.said(g.parts[part], one.Version, cache.Encrypt, plugins.Binding{ContextBound: one.ContextBound}, word{err: err, began: began})
		}
		return made, err
	}
	if len(parts) == 1 { // as a rule: no goroutine is needed
		made, err := wrapBy(ctx, parts[0])
		if err != nil {
			return nil, map[int]error{parts[0]: err}
		}
		return sealedKey{made}, map[int]error{parts[0]: nil}
	}
	ctx, cancel := context.WithCancel(ctx)
	answers := make(chan answer, len(parts))
	var under sync.WaitGroup
	defer func() {
		cancel()
		under.Wait() // they read the material
	}()
	for _, part := range parts {
		under.Go(func() {
			made, err := wrapBy(ctx, part)
			answers <- answer{part, made, err}
		})
	}
	made, errs := sealedKey{}, map[int]error{}
	var late <-chan time.Time
	for len(errs) < len(parts) {
		select {
		case a := <-answers:
			if errs[a.part] = a.err; a.err == nil {
				made = append(made, a.made)
			}
		case <-late:
			return inOrder(made), errs
		}
		if late == nil && len(made) >= g.least && len(errs) < len(parts) {
			timer := time.NewTimer(g.allowed(parts, errs, stragglers))
			defer timer.Stop()
			late = timer.C
		}
	}
	return inOrder(made), errs
}

func inOrder(k sealedKey) sealedKey {
	slices.SortFunc(k, func(a, b sealed) int { return a.part - b.part })
	return k
}

// unwrapGroup opens a data key by whichever part answers first: the next one is asked
// when one fails, or takes its time. The result is the caller's to clear; by tells which
// of them it was.
func (s *Service) unwrapGroup(ctx context.Context, g *group, k sealedKey) (material []byte, by int, err error) {
	parts := make([]int, len(k))
	for i, one := range k {
		parts[i] = one.part
	}
	material, by, errs := race(ctx, s, g, g.byHealth(parts), func(ctx context.Context, part int) ([]byte, error) {
		return s.unwrap(ctx, g.parts[part], *k.of(part))
	}, func(late []byte) { clear(late) })
	if by >= 0 {
		return material, by, nil
	}
	return nil, by, s.combine(g, errs)
}

// wrapped makes sure of what one part has opened that the others have wrapped what they are
// said to have, where they refuse what they have not: else a caller could choose what they
// are asked. It returns a copy of the data key that keeps no message in memory, and knows
// which parts have opened it.
func (s *Service) wrapped(ctx context.Context, g *group, a cache.Authority, k sealedKey, by int, material []byte) (sealedKey, error) {
	k = k.provenBy(by)
	if len(g.parts) == 1 {
		return k, nil
	}
	for i, one := range k {
		w := g.parts[one.part]
		if one.part == by || !w.withholds("", cache.Decrypt, a.Context) {
			continue
		}
		same, err := s.unwrapPatiently(ctx, w, one)
		k[i].proven = err == nil && subtle.ConstantTimeCompare(same, material) == 1
		clear(same)
		switch {
		case k[i].proven:
		case g.refuses(err):
			return nil, err
		default:
			return nil, s.suspended(g, one.part, one.version)
		}
	}
	return k, nil
}

// unwrapPatiently is unwrap by a part that nothing can be done without: one that is slow has
// its time, one that does not answer is waited for once. A call that is not waited for goes
// on, since its answer tells which of them it is.
func (s *Service) unwrapPatiently(ctx context.Context, w *wrapping, k sealed) ([]byte, error) {
	patience := stragglers
	switch w.failing.Load() {
	case slowly:
		patience = describeTimeout
	case unanswered:
		patience = hedgeAfter
	}
	detached, done, err := s.strays.begin(ctx)
	if err != nil {
		return nil, err
	}
	type answer struct {
		material []byte
		err      error
	}
	answers, over := make(chan answer), make(chan struct{})
	defer close(over)
	go func() {
		defer done()
		material, err := s.unwrap(detached, w, k)
		select {
		case answers <- answer{material, err}:
		case <-over:
			clear(material)
		}
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case a := <-answers:
		return a.material, a.err
	case <-timer.C:
		w.failing.Store(unanswered) // until it is
		return nil, plugins.Errorf(plugins.Unavailable, "backend %s has not answered within %s", w.id.backend, patience)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// provenBy returns a copy that keeps no message in memory, and knows which of them has
// been opened.
func (k sealedKey) provenBy(part int) sealedKey {
	out := make(sealedKey, len(k))
	for i, s := range k {
		out[i] = s.clone()
		out[i].proven = s.part == part
	}
	return out
}

// byHealth puts the parts first whose last call went well.
func (g *group) byHealth(parts []int) []int {
	sorted := slices.Clone(parts)
	slices.SortStableFunc(sorted, func(a, b int) int {
		return int(g.parts[a].failing.Load()) - int(g.parts[b].failing.Load())
	})
	return sorted
}

// of returns what a part has wrapped of a data key.
func (k sealedKey) of(part int) *sealed {
	if i := slices.IndexFunc(k, func(s sealed) bool { return s.part == part }); i >= 0 {
		return &k[i]
	}
	return nil
}

// retireLacking retires data keys that miss a wrap once every part answers.
func (s *Service) retireLacking(g *group, errs map[int]error) {
	for part := range g.parts {
		if err, asked := errs[part]; !asked || err != nil {
			return
		}
	}
	if g.lacking.CompareAndSwap(true, false) {
		s.cache.Retire(g.id.backend, g.id.uri, func(origin any) bool { return len(sealedOf(origin)) < len(g.parts) })
	}
}

// retireWithout retires data keys that miss the wrap of one backend.
func (s *Service) retireWithout(g *group, backend string) {
	if !g.lacking.CompareAndSwap(true, false) {
		return
	}
	part := slices.IndexFunc(g.parts, func(w *wrapping) bool { return w.id.backend == backend })
	s.cache.Retire(g.id.backend, g.id.uri, func(origin any) bool {
		k := sealedOf(origin)
		if k.of(part) != nil && len(k) < len(g.parts) {
			g.lacking.Store(true) // another backend is away still
		}
		return k.of(part) == nil
	})
}

// Reached tells that a backend answers, by a question that concerned no key. Data keys
// that miss its wrap are retired first.
func (s *Service) Reached(backend string) {
	s.mu.Lock()
	var groups []*group
	for _, g := range s.groups {
		if slices.ContainsFunc(g.parts, func(w *wrapping) bool { return w.id.backend == backend }) {
			groups = append(groups, g)
		}
	}
	s.mu.Unlock()
	for _, g := range groups {
		s.retireWithout(g, backend)
		s.cache.Reached(g.id.backend)
	}
}

var errNoPart = errors.New("its wrapping key is none of this key's")

// foreignPart is for an EDK under a wrapping key that the configuration does not give
// its logical key.
func foreignPart(key, uri string) *Error {
	return undecryptable(key, fmt.Errorf("wrapped under %s: %w", uri, errNoPart))
}

func (g *group) askAgain() {
	for _, w := range g.parts {
		w.askAgain()
	}
}

// known returns what is known of the versions. Those of several wrapping keys have
// their backend before them.
func (g *group) known() (current string, all []plugins.KeyVersion) {
	v := make(versions, len(g.parts))
	for part, w := range g.parts {
		d := w.described.Load()
		if d == nil {
			continue
		}
		v[part] = d.Current
		if len(g.parts) == 1 {
			return d.Current, d.Versions
		}
		for _, one := range d.Versions {
			one.Version = w.id.backend + ":" + one.Version
			all = append(all, one)
		}
	}
	if all == nil {
		return "", nil
	}
	return v.String(), all
}
