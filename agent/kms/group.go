package kms

import (
	"context"
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

const (
	// hedgeAfter is how long the first backend has for opening a data key before the
	// next is asked too.
	hedgeAfter = 150 * time.Millisecond
	// stragglers is how long a wrap waits for further backends once enough of them
	// have wrapped.
	stragglers = time.Second
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
	lacking atomic.Bool

	mu sync.Mutex
	// askedAll is when all parts were last asked about an authority, or when it was
	// first used. mu guards it.
	askedAll map[cache.Authority]time.Duration
}

func newGroup(key string, parts []*wrapping, least int) *group {
	g := &group{key: key, parts: parts, least: max(1, least), askedAll: map[cache.Authority]time.Duration{}}
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

// sealedKey is one data key, wrapped by some parts of a group: no two elements are of
// the same part, and they stand in the order of the parts.
type sealedKey []sealed

func (k sealedKey) clone() sealedKey {
	out := make(sealedKey, len(k))
	for i, s := range k {
		out[i] = s.clone()
	}
	return out
}

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

// each runs f for some parts at once and returns what it said, by part; parts left
// out have nil in errs.
func each(parts []int, f func(part int) error) map[int]error {
	var mu sync.Mutex
	errs := make(map[int]error, len(parts))
	if len(parts) == 1 { // as a rule: no goroutine is needed
		errs[parts[0]] = f(parts[0])
		return errs
	}
	var all sync.WaitGroup
	for _, part := range parts {
		all.Go(func() {
			err := f(part)
			mu.Lock()
			defer mu.Unlock()
			errs[part] = err
		})
	}
	all.Wait()
	return errs
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
		switch class := plugins.ClassOf(err); {
		case !asked:
		case err == nil:
			yes = true
		case class == plugins.KeyNotFound:
			missing = err
			if len(g.parts) > 1 {
				s.alarm("one of the backends of a key does not have it", err, g.parts[part].id.backend, g.parts[part].id.uri)
			}
		case class.Definite():
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
	}
	return missing
}

// describeGroup returns the current versions of the parts. A part of which nothing is
// known is left out, as long as there is another.
func (s *Service) describeGroup(ctx context.Context, g *group, maxAge time.Duration) (versions, []*described, error) {
	known := make([]*described, len(g.parts))
	ask := func(part int) (err error) {
		known[part], err = s.describe(ctx, g.parts[part], maxAge)
		return err
	}
	var stale []int
	for part, w := range g.parts {
		if d := w.described.Load(); d != nil && s.now()-d.at <= maxAge {
			known[part] = d
		} else {
			stale = append(stale, part)
		}
	}
	if len(stale) > 0 {
		errs := each(stale, ask)
		for part, d := range known {
			if d != nil {
				errs[part] = nil
			}
		}
		if err := s.combine(g, errs); err != nil {
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
	err := s.combine(g, errs)
	if err == nil {
		err = g.withheld(v, cache.Encrypt)
	}
	switch {
	case err != nil:
		return nil, err
	case len(made) < g.least:
		return nil, plugins.Errorf(plugins.Unavailable, "%d of the %d backends of key %s have wrapped, and min_wraps is %d", len(made), len(g.parts), g.key, g.least)
	}
	if len(made) < len(g.parts) {
		g.lacking.Store(true)
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
	ctx, cancel := context.WithCancel(ctx)
	answers := make(chan answer, len(parts))
	var under sync.WaitGroup
	defer func() {
		cancel()
		under.Wait() // they read the material
	}()
	for _, part := range parts {
		one := info
		one.URI, one.Version = g.parts[part].id.uri, v[part]
		under.Go(func() {
			made, err := s.wrap(ctx, g.parts[part], material, one, encryptionContext)
			made.part = part
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
			timer := time.NewTimer(stragglers)
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
// when one fails, or takes its time. The result is the caller's to clear.
func (s *Service) unwrapGroup(ctx context.Context, g *group, k sealedKey) ([]byte, error) {
	k = g.byHealth(k)
	if len(k) == 1 {
		return s.unwrap(ctx, g.parts[k[0].part], k[0])
	}
	type answer struct {
		part     int
		material []byte
		err      error
	}
	ctx, cancel := context.WithCancel(ctx)
	answers := make(chan answer, len(k))
	asked := 0
	next := func() {
		if asked < len(k) {
			one := k[asked]
			go func() {
				material, err := s.unwrap(ctx, g.parts[one.part], one)
				answers <- answer{one.part, material, err}
			}()
			asked++
		}
	}
	errs := map[int]error{}
	defer func() {
		cancel()
		go func(late int) { // what comes too late is erased
			for range late {
				clear((<-answers).material)
			}
		}(asked - len(errs))
	}()
	next()
	hedge := time.NewTicker(hedgeAfter)
	defer hedge.Stop()
	for len(errs) < len(k) {
		select {
		case a := <-answers:
			errs[a.part] = a.err
			class := plugins.ClassOf(a.err)
			if a.err == nil {
				return a.material, nil
			}
			if class.Definite() && class != plugins.KeyNotFound {
				return nil, a.err
			}
			next()
		case <-hedge.C:
			next()
		}
	}
	return nil, s.combine(g, errs)
}

// byHealth puts the parts first whose last call went well.
func (g *group) byHealth(k sealedKey) sealedKey {
	if len(k) < 2 {
		return k
	}
	sorted := slices.Clone(k)
	slices.SortStableFunc(sorted, func(a, b sealed) int {
		return int(g.parts[a.part].failing.Load()) - int(g.parts[b.part].failing.Load())
	})
	return sorted
}

// confirmGroup asks all parts that an authority names whether they still say yes.
func (s *Service) confirmGroup(ctx context.Context, g *group, a cache.Authority, sample any) error {
	v, err := g.parseVersions(a.Version)
	if err != nil {
		return err
	}
	g.asked(a, s.now())
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
	errs := each(parts, func(part int) error {
		if a.Direction == cache.Encrypt {
			return s.confirmWrap(ctx, g.parts[part], v[part])
		}
		return s.confirmUnwrap(ctx, g.parts[part], v[part], known.of(part))
	})
	if err = s.combine(g, errs); err == nil {
		err = g.withheld(v, a.Direction)
	}
	if err == nil && a.Direction == cache.Encrypt {
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
// answers proves nothing. It also asks them once in maxAge: each data key that one part
// opens, or wraps alone, confirms the authority, so that a refresh that would ask the
// others may never be due.
func (s *Service) sure(ctx context.Context, g *group, a cache.Authority, sample sealedKey, maxAge time.Duration) error {
	if len(g.parts) == 1 {
		return nil
	}
	v, err := g.parseVersions(a.Version)
	if err != nil {
		return err
	}
	if s.cache.Recheck(a) == nil && g.withheld(v, a.Direction) == nil && !g.overdue(a, s.now(), maxAge) {
		return nil
	}
	return s.confirmGroup(ctx, g, a, sample)
}

// overdue tells one of those who ask that all parts must be asked.
func (g *group) overdue(a cache.Authority, now, maxAge time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	last, ok := g.askedAll[a]
	if ok && now-last < maxAge {
		return false
	}
	g.askedAll[a] = now
	return ok
}

// asked notes that all parts are being asked.
func (g *group) asked(a cache.Authority, now time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.askedAll[a] = now
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
	s.retire(g)
}

func (s *Service) retire(g *group) {
	if !g.lacking.CompareAndSwap(true, false) {
		return
	}
	s.cache.Retire(g.id.backend, g.id.uri, func(origin any) bool {
		return len(sealedOf(origin)) < len(g.parts)
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
		s.retire(g)
		s.cache.Reached(g.id.backend)
	}
}

var errNoPart = errors.New("its wrapping key is none of this key's")

// foreignPart is for an EDK under a wrapping key that the configuration does not give
// its logical key.
func foreignPart(key, uri string) *Error {
	return undecryptable(key, fmt.Errorf("wrapped under %s: %w", uri, errNoPart))
}

// wrapFirst has key material wrapped by the first part that answers, in the order of
// the configuration.
func (s *Service) wrapFirst(ctx context.Context, g *group, v versions, material []byte, info envelope.ProviderInfo, encryptionContext map[string]string) (sealed, error) {
	errs := map[int]error{}
	for part, version := range v {
		if version == "" {
			continue
		}
		info.URI, info.Version = g.parts[part].id.uri, version
		wrapped, err := s.wrap(ctx, g.parts[part], material, info, encryptionContext)
		if err == nil {
			wrapped.part = part
			return wrapped, nil
		}
		if errs[part] = err; ctx.Err() != nil || g.refuses(err) {
			break
		}
	}
	return sealed{}, s.combine(g, errs)
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
