package hsm

import (
	"bytes"
	"sync"
	"time"
)

// keyring is what was read of the catalogue.
type keyring struct {
	mu   sync.Mutex
	read map[string]read // mu guards read
}

type read struct {
	key    *Key
	at     int64 // when the reading began
	vainly int64 // when a reading began that was for a version which is not there
}

func (r *keyring) cached(name string) (read, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	got, ok := r.read[name]
	return got, ok
}

// keep keeps a key whose reading began at a time. Versions that are what they were stay
// the same values, and keep their handles.
func (r *keyring) keep(k *Key, at int64) *Key {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.read == nil {
		r.read = map[string]read{}
	}
	for _, v := range k.Versions {
		v.seen = at
	}
	if old, ok := r.read[k.Name]; ok {
		// Revisions do not tell: a key that is restored or made anew has lower ones.
		if old.at > at {
			return old.key // somebody read later than we did
		}
		for i, v := range k.Versions {
			if before, err := old.key.Version(v.Number); err == nil && before.same(v) {
				k.Versions[i] = before
			}
		}
	}
	r.read[k.Name] = read{key: k, at: at}
	return k
}

// inVain notes that a key was read for a version which is not there. Who asks for one
// number after the other does not have the token read each time: only after a second, by
// when the key is read again anyway.
func (r *keyring) inVain(name string, at int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if got, ok := r.read[name]; ok {
		got.vainly = at
		r.read[name] = got
	}
}

// lookedInVain tells whether the key was read lately for a version which is not there.
func (r *keyring) lookedInVain(name string, now int64) bool {
	got, ok := r.cached(name)
	return ok && got.vainly != 0 && time.Duration(now-got.vainly) < catalogueAge
}

// versions returns all versions that were read.
func (r *keyring) versions() (all []*Version) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, got := range r.read {
		all = append(all, got.key.Versions...)
	}
	return all
}

// isCurrent tells whether new data keys are wrapped under a version, by what was read.
func (r *keyring) isCurrent(v *Version) bool {
	got, ok := r.cached(v.Key)
	return ok && got.key.Current == v.Number
}

func (r *keyring) forget(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.read, name)
}

func (v *Version) same(o *Version) bool {
	return v.Number == o.Number && v.Suite == o.Suite && v.State == o.State && v.ID == o.ID && v.macID == o.macID && v.style == o.style &&
		v.canarySum == o.canarySum && v.takes == o.takes && v.Key == o.Key && bytes.Equal(v.canary, o.canary)
}
