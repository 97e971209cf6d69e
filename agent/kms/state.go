package kms

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/agent/quota"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/plugins"
)

// Partition says what may share a data key for encryption.
type Partition string

// The partitions.
const (
	// PartitionCaller gives each caller data keys of its own. The default.
	PartitionCaller Partition = "caller"
	// PartitionKey lets all callers of a key share.
	PartitionKey Partition = "key"
	// PartitionContext gives each encryption context data keys of its own.
	PartitionContext Partition = "context"
)

// Key is one logical key.
type Key struct {
	Name        string
	FormerNames []string
	Labels      map[string]string
	// Wraps are its wrapping keys, one at least and each in a backend of its own,
	// with URIs that differ.
	Wraps []Wrap
	// MinWraps is how many of them must wrap a new data key; 0 is 1.
	MinWraps int
	// BindContext makes the wrapping key authenticate the encryption context
	// of messages too, at the price of one data key for each context.
	BindContext bool
	// MaxVersionAge is how old the version of the wrapping key may be under which
	// something new is encrypted or wrapped: the originator-usage period of SP
	// 800-57 part 1, which backends do not enforce. 0 is no limit.
	MaxVersionAge time.Duration
	// Limits are those of data keys in both directions, without Grace.
	Limits    cache.Limits
	Partition Partition
	// Grace is how long an outage may last before the key is of no use any more.
	Grace Grace
}

// Wrap names a wrapping key of a logical key.
type Wrap struct {
	// Backend names an entry of Config.Backends.
	Backend string
	// WrappingKey is the backend-independent URI of the wrapping key, such as
	// "local:orders". It belongs to exactly one logical key.
	WrappingKey string
}

// Grace is the time from the first failed upstream call in which data keys whose
// confirmation is too old may still be used; zero is none.
type Grace struct{ Encrypt, Decrypt time.Duration }

// limits are those of the data keys of one direction.
func (k *Key) limits(d cache.Direction) cache.Limits {
	l := k.Limits
	if l.Grace = k.Grace.Encrypt; d == cache.Decrypt {
		l.Grace, l.Spares = k.Grace.Decrypt, 0
	}
	return l
}

// Config is what an administrator decides, and what a reload replaces.
type Config struct {
	Keys     []Key
	Policy   *policy.Policy
	Backends map[string]plugins.Backend
	// Upstreams tells what a backend is beside its name: what is stored of a backend
	// that was another one then is dropped.
	Upstreams map[string]string
	// Administrators says which local users may do what on the admin door.
	Administrators []Administrator
	// DataKeyUse bounds how long a receiver may cache a data key in clear.
	DataKeyUse time.Duration
	// MaxStream bounds the plaintext of one stream, in bytes.
	MaxStream uint64
}

// state is one configuration, ready for use and never changed.
type state struct {
	Config
	keys  map[string]*key // by name and by former name
	names []string        // sorted, without former names
	// limited are the rules whose limits are counted, by name.
	limited map[string]*quota.Rule
}

type key struct {
	Key
	group *group
}

func emptyState() *state { return &state{keys: map[string]*key{}} }

// Apply puts a configuration to use. Operations under way finish with the
// state they began with. Data keys of keys that are gone are destroyed.
func (s *Service) Apply(c Config) (err error) {
	next := emptyState()
	next.Config = c
	s.mu.Lock()
	defer s.mu.Unlock()
	used, groups := map[wrappingID]*wrapping{}, map[wrappingID]*group{}
	for _, k := range c.Keys {
		g, err := s.groupOf(next, used, k)
		if err != nil {
			return err
		}
		groups[g.id] = g
		if err := next.add(k, g); err != nil {
			return err
		}
	}
	slices.Sort(next.names)
	if next.limited, err = s.limit(c.Policy); err != nil {
		return err
	}
	previous, before := s.state.Swap(next), s.groups
	s.wrappings, s.groups = used, groups
	for _, g := range groups {
		for _, w := range g.parts {
			w.group.Store(g)
		}
	}
	for _, name := range previous.names {
		old := previous.keys[name]
		if k := next.keys[name]; k == nil || k.group != old.group {
			s.cache.EvictKey(name)
		} else if old.Limits.Store && !k.Limits.Store {
			s.cache.Unstore(name)
		}
	}
	for _, g := range before {
		if !slices.ContainsFunc(slices.Collect(maps.Values(groups)), func(other *group) bool { return other.id.backend == g.id.backend }) {
			s.cache.Forget(g.id.backend)
		}
	}
	return nil
}

// groupOf returns the wrapping keys of a logical key, those of before where nothing
// has changed. It requires s.mu.
func (s *Service) groupOf(next *state, used map[wrappingID]*wrapping, k Key) (*group, error) {
	if len(k.Wraps) == 0 || k.MinWraps > len(k.Wraps) {
		return nil, fmt.Errorf("kms: key %q: %d wrapping keys, %d at least must wrap", k.Name, len(k.Wraps), max(1, k.MinWraps))
	}
	parts := make([]*wrapping, len(k.Wraps))
	for i, wrap := range k.Wraps {
		backend := next.Backends[wrap.Backend]
		if backend == nil {
			return nil, fmt.Errorf("kms: key %q: no backend %q", k.Name, wrap.Backend)
		}
		id := wrappingID{backend: wrap.Backend, uri: wrap.WrappingKey}
		if used[id] != nil {
			return nil, fmt.Errorf("kms: key %q: wrapping key %s of backend %s belongs to key %q already", k.Name, id.uri, id.backend, used[id].key)
		}
		w := s.wrappings[id]
		if before := w; w == nil || w.backend != backend || w.key != k.Name {
			if w = newWrapping(id, k.Name, backend); before != nil {
				w.verdicts = before.verdicts // that the configuration of the backend has changed is no yes
			}
		}
		used[id], parts[i] = w, w
	}
	g := newGroup(k.Name, parts, k.MinWraps)
	if old := s.groups[g.id]; old.same(parts, k.MinWraps) {
		return old, nil
	}
	return g, nil
}

// add puts a key under its names.
func (st *state) add(k Key, g *group) error {
	entry := &key{Key: k, group: g}
	for _, name := range append([]string{k.Name}, k.FormerNames...) {
		if st.keys[name] != nil {
			return fmt.Errorf("kms: key %q: the name %q belongs to key %q already", k.Name, name, st.keys[name].Name)
		}
		st.keys[name] = entry
	}
	st.names = append(st.names, k.Name)
	return nil
}
