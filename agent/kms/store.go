package kms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// storedEDK is sealed in the store.
type storedEDK struct {
	ProviderID string            `json:"provider_id"`
	Info       []byte            `json:"info"`
	Ciphertext []byte            `json:"ciphertext"`
	Version    string            `json:"version"`
	Purpose    string            `json:"purpose"`
	Bound      bool              `json:"bound,omitempty"`
	Context    map[string]string `json:"context,omitempty"`
	Proven     bool              `json:"proven,omitempty"`
}

// storedOrigin is what the cache keeps with a data key, in the store.
type storedOrigin struct {
	// Made tells that the agent made the data key, for messages.
	Made bool        `json:"made,omitempty"`
	EDKs []storedEDK `json:"edks"`
}

func marshalOrigin(origin any) ([]byte, error) {
	var stored storedOrigin
	_, stored.Made = origin.(*made)
	for _, k := range sealedOf(origin) {
		stored.EDKs = append(stored.EDKs, k.stored())
	}
	if len(stored.EDKs) == 0 {
		return nil, fmt.Errorf("kms: %T is no encrypted data key", origin)
	}
	return json.Marshal(stored)
}

func (k sealed) stored() storedEDK {
	return storedEDK{
		ProviderID: k.edk.ProviderID, Info: k.edk.ProviderInfo, Ciphertext: k.edk.Ciphertext, Version: k.version,
		Purpose: k.binding.Purpose, Bound: k.binding.ContextBound, Context: k.binding.Context, Proven: k.proven,
	}
}

// sealed undoes stored, but for the part.
func (e storedEDK) sealed() sealed {
	return sealed{
		edk:     envelope.EDK{ProviderID: e.ProviderID, ProviderInfo: e.Info, Ciphertext: e.Ciphertext},
		version: e.Version, proven: e.Proven,
		binding: plugins.Binding{Purpose: e.Purpose, ProviderInfo: e.Info, ContextBound: e.Bound, Context: e.Context},
	}
}

// unmarshalOrigin undoes marshalOrigin for the configuration in use. What does not fit
// it is an error.
func (s *Service) unmarshalOrigin(encoded []byte) (any, error) {
	var stored storedOrigin
	if err := json.Unmarshal(encoded, &stored); err != nil {
		return nil, fmt.Errorf("kms: stored encrypted data key: %w", err)
	}
	var g *group
	var key sealedKey
	for _, e := range stored.EDKs {
		info, err := envelope.ParseProviderInfo(e.Info)
		if err != nil {
			return nil, fmt.Errorf("kms: stored encrypted data key: %w", err)
		}
		k := s.state.Load().keys[info.Key]
		if k == nil || g != nil && g != k.group || k.group.partOf(info.URI) < 0 {
			return nil, cache.ErrUnfit
		}
		g = k.group
		one := e.sealed()
		one.part = g.partOf(info.URI)
		key = append(key, one)
	}
	switch {
	case g == nil:
		return nil, errors.New("kms: stored encrypted data key: there is none")
	case stored.Made:
		return g.made(inOrder(key)), nil
	}
	return inOrder(key), nil
}

// storedWrapping is what is known of a wrapping key, in the store: without it an
// agent that starts in an outage would know no current version. Upstream is
// Config.Upstreams' word for its backend.
type storedWrapping struct {
	Backend  string               `json:"backend"`
	URI      string               `json:"uri"`
	Upstream string               `json:"upstream"`
	Current  string               `json:"current"`
	Versions []plugins.KeyVersion `json:"versions"`
	// Last is the version that was current when that was told last, if Current is not known.
	Last string `json:"last,omitempty"`
	// Refused are the versions that it has refused and not allowed since.
	Refused []storedRefusal `json:"refused,omitempty"`
	// Denied: it has said that it tells nothing of the key, or more is refused than there
	// is room for.
	Denied bool `json:"denied,omitempty"`
	// SeesContext: its policy sees contexts, as its plugin said when it ran.
	SeesContext bool `json:"sees_context,omitempty"`
	// Canaries are what the agent can ask about its versions with.
	Canaries []storedEDK `json:"canaries,omitempty"`
}

type storedRefusal struct {
	Version   string          `json:"version"`
	Direction cache.Direction `json:"direction"`
	Unbound   bool            `json:"unbound,omitempty"`
	Told      bool            `json:"told,omitempty"`
	Policy    bool            `json:"policy,omitempty"`
	Of        *storedEDK      `json:"of,omitempty"`
}

// storeConfig adds to where the store is what only this package can say of data keys.
func (s *Service) storeConfig(c *cache.StoreConfig) *cache.StoreConfig {
	if c == nil {
		return nil
	}
	own := *c
	own.Marshal, own.Unmarshal, own.Notes = marshalOrigin, s.unmarshalOrigin, s.notes
	return &own
}

// notes are the wrapping keys of keys that are stored. It is the cache's Notes.
func (s *Service) notes() []cache.Note {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.state.Load()
	var notes []cache.Note
	for id, w := range s.wrappings {
		if k := st.keys[w.key]; k == nil || !k.Limits.Store {
			continue
		}
		known := w.described.Load()
		note := storedWrapping{Backend: id.backend, URI: id.uri, Upstream: st.Upstreams[id.backend], Refused: w.refusals(), Denied: w.denied(), SeesContext: w.seesContext(), Last: w.lastCurrent()}
		switch {
		case known != nil:
			note.Current, note.Versions, note.Canaries = known.Current, known.Versions, w.storedCanaries()
		case len(note.Refused) > 0 || note.Denied:
			known = &described{at: s.now()}
		default:
			continue
		}
		if text := note.text(); text != nil {
			notes = append(notes, cache.Note{Value: text, At: known.at})
		}
	}
	return notes
}

const (
	// maxNote bounds one, in bytes: some hundred versions. A wrapping key with more waits
	// for upstream after a restart.
	maxNote = 60 << 10
	// maxProbe bounds what a version can be asked with, in a note: one with a large context
	// is left out.
	maxProbe = 4 << 10
)

// text is the note as it is stored. What does not fit is left out, and what is refused
// last: the whole key stands for it then.
func (n storedWrapping) text() []byte {
	for _, less := range []func(){
		func() {},
		func() {
			for i := range n.Refused {
				n.Refused[i].Of = nil
			}
		},
		func() { n.Canaries = nil },
		func() { n.Current, n.Versions = "", nil },
		func() { n.Denied, n.Refused = true, nil },
	} {
		less()
		if text, err := json.Marshal(n); err == nil && len(text) <= maxNote {
			return text
		}
	}
	return nil
}

// Restore takes in what Options.Store has of the keys of the configuration in use. Call
// it once, after the first Apply and before any operation. An error means a start
// without what was stored; it wraps one of package seal's.
func (s *Service) Restore() (cache.Restored, error) {
	var of map[wrappingID]*wrapping
	s.mu.Lock()
	groups := maps.Clone(s.groups)
	s.mu.Unlock()
	restored, err := s.cache.Restore(func(notes []cache.Note) cache.Accept {
		of = s.recall(notes)
		st := s.state.Load()
		return func(a cache.Authority) (string, cache.Limits, bool) {
			g := groups[wrappingID{backend: a.Backend, uri: a.WrappingKey}]
			if g == nil || !g.recalled(a.Version, of) {
				return "", cache.Limits{}, false
			}
			return g.key, st.keys[g.key].limits(a.Direction), true
		}
	})
	for _, g := range groups {
		if s.isDown(g) {
			for _, w := range g.parts {
				w.failures.Store(1) // nobody waits for the backend before its outage is over
			}
		}
	}
	return restored, err
}

// recalled tells whether all wrapping keys that versions are of have been recalled.
func (g *group) recalled(name string, of map[wrappingID]*wrapping) bool {
	v, err := g.parseVersions(name)
	if err != nil {
		return false
	}
	for part, version := range v {
		if version != "" && of[g.parts[part].id] == nil {
			return false
		}
	}
	return true
}

// recall takes in what was known of wrapping keys, and returns those whose data keys may
// come back.
func (s *Service) recall(notes []cache.Note) map[wrappingID]*wrapping {
	s.mu.Lock()
	defer s.mu.Unlock()
	st, of := s.state.Load(), map[wrappingID]*wrapping{}
	for _, n := range notes {
		var stored storedWrapping
		if json.Unmarshal(n.Value, &stored) != nil {
			continue // of another version of the program: as if it were not there
		}
		id := wrappingID{backend: stored.Backend, uri: stored.URI}
		w := s.wrappings[id]
		if w == nil {
			continue
		}
		w.refusedBefore(stored) // also where it was another backend: a no may be believed
		if !st.keys[w.key].Limits.Store || stored.Upstream != st.Upstreams[id.backend] || stored.Current == "" {
			continue
		}
		d := &described{Description: plugins.Description{Current: stored.Current, Versions: stored.Versions}, at: n.At}
		w.described.CompareAndSwap(nil, d)
		w.takeCanaries(stored.Canaries)
		of[id] = w
	}
	return of
}

func (w *wrapping) storedCanaries() []storedEDK {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []storedEDK
	for _, k := range w.canaries {
		if stored := k.storedSmall(); stored != nil {
			all = append(all, *stored)
		}
	}
	return all
}

func (w *wrapping) takeCanaries(stored []storedEDK) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range stored {
		k := e.sealed()
		k.proven = true
		if _, ok := w.canaries[k.version]; !ok {
			w.canaries[k.version] = k
		}
	}
}

func (s *Service) isDown(g *group) bool {
	current := make(versions, len(g.parts))
	for part, w := range g.parts {
		if known := w.described.Load(); known != nil {
			current[part] = known.Current
		}
	}
	for _, d := range []cache.Direction{cache.Encrypt, cache.Decrypt} {
		if s.cache.Standing(g.authority(current, d), cache.Limits{}).Down {
			return true
		}
	}
	return false
}

// StoreStats tells of the store.
func (s *Service) StoreStats() cache.StoreStats { return s.cache.StoreStats() }

// ErrNotOnDisk is wrapped by the error of an eviction that a restart could undo.
var ErrNotOnDisk = errors.New("evicted from memory, but the sealed store could not be written")

// evicted waits until what was evicted is gone from the store too.
func (s *Service) evicted() error {
	ctx, cancel := context.WithTimeout(context.Background(), evictTimeout)
	defer cancel()
	if err := s.cache.Flush(ctx); err != nil {
		return fmt.Errorf("%w: %w", ErrNotOnDisk, err)
	}
	return nil
}

const evictTimeout = 5 * time.Second
