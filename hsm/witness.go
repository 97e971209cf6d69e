package hsm

import (
	"cmp"
	"context"
	"errors"
	"iter"
	"slices"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// verdict is what other versions say of the token.
type verdict uint8

const (
	nobody verdict = iota // there is none that could say anything
	unwell                // those that were asked fail too, or had no time to answer
	well                  // one is served: what fails is a version's own matter
)

const (
	// maxWitnesses is how many versions are asked that can answer, maxCandidates how many
	// are looked at, and maxRecords how many keys of the catalogue.
	maxWitnesses, maxCandidates, maxRecords = 3, 16, 8
	// mostWitnessTime and leastWitnessTime bound how long they are asked.
	mostWitnessTime, leastWitnessTime = 500 * time.Millisecond, 50 * time.Millisecond
)

// ask tells whether the token serves another version than v now: whether it wraps with it,
// or opens its canary. It decides between an outage of v and one of the token. So it goes
// on where the caller's time ends, and ends soon: who leaves must keep no connection that
// is lost, and end none that is well.
func (t *Token) ask(ctx context.Context, a *attachment, v *Version, wraps bool) verdict {
	began := t.now()
	if wraps && (a.haveWrapped(began) || t.keys.served(v, began-int64(illPause), true)) {
		return well // it costs others their wraps to ask them
	}
	bounded, cancel := context.WithTimeout(as(context.WithoutCancel(ctx), asker), witnessTime(ctx))
	defer cancel()
	asked, looked, opened := 0, 0, false
	for o := range t.witnesses(bounded, a, v, wraps) {
		if asked == maxWitnesses || looked == maxCandidates || a.over() || bounded.Err() != nil {
			break
		}
		looked++
		opens, err := t.testify(bounded, a, o, wraps)
		if err == nil {
			if wraps {
				a.witness.Store(&testimony{a.epoch.Load(), t.now()})
			}
			return well
		}
		opened = opened || opens
		if !mute(err) {
			asked++
		}
	}
	switch {
	case a.over():
		return unwell
	case t.keys.served(v, began, wraps), opened && asked == 0:
		return well
	case asked == 0 && bounded.Err() == nil:
		return nobody
	}
	return unwell
}

// testimony is when a version wrapped for another one, in which login.
type testimony struct{ epoch, at int64 }

// wrapsFor is how long it counts.
const wrapsFor = 5 * time.Second

// haveWrapped tells whether a version has wrapped lately for another one.
func (a *attachment) haveWrapped(now int64) bool {
	last := a.witness.Load()
	return last != nil && last.epoch == a.epoch.Load() && time.Duration(now-last.at) < wrapsFor
}

// witnessTime is a part of what is left of the caller's time.
func witnessTime(ctx context.Context) time.Duration {
	most := mostWitnessTime
	if deadline, ok := ctx.Deadline(); ok {
		most = min(most, time.Until(deadline)/3)
	}
	return max(most, leastWitnessTime)
}

// mute tells whether a failure of a version says nothing of the token: it may not do what
// it is asked for, whatever the token can.
func mute(err error) bool {
	kind := Kind(0)
	if known := (*Error)(nil); errors.As(err, &known) {
		kind = known.Kind
	}
	return errors.As(err, new(uncounted)) || stepFor(err) == fewer || errors.Is(err, errStale) || errors.Is(err, errNoPublic) || errors.Is(err, errNoKey) || denied(err) ||
		kind == KeyNotFound || kind == KeyUnusable
}

// testify has a version open its canary, and wrap. Its keys are looked for where they are
// not bound, and not bound by it: that is for those who want to use it. That a session, a
// handle or the login was lost, or a session is not to be had, says nothing of the token.
func (t *Token) testify(ctx context.Context, a *attachment, o *Version, wraps bool) (opens bool, err error) {
	bound := o.bound(a, false)
	for range attempts {
		var keys handles
		if bound != nil {
			keys = bound.keys
		} else {
			keys, err = t.search(ctx, a, o.find)
		}
		if err == nil {
			err = t.openCanary(ctx, a, o, keys)
		}
		if opens = err == nil; opens && wraps {
			_, err = t.try(ctx, a, o, keys)
		}
		switch s := stepFor(err); {
		case s == newSession, s == fewer:
		case s == loginAgain && t.relogin(ctx, a) == nil:
		case s == findAgain && (bound != nil || errors.Is(err, errStale)):
			bound = nil
		default:
			return opens, err
		}
	}
	return opens, err
}

// witnesses gives versions that may speak for the token: the current ones of other keys,
// those first that were served last, then of keys of the catalogue that nobody has used,
// and what is left. Those that are ill themselves are none. Of wraps pairs speak for pairs
// alone, as public keys may be spoiled by everybody.
func (t *Token) witnesses(ctx context.Context, a *attachment, v *Version, wraps bool) iter.Seq[*Version] {
	return func(yield func(*Version) bool) {
		given := map[ID]bool{v.ID: true}
		give := func(all []*Version) bool {
			for _, o := range all {
				if given[o.ID] || o.mayUnwrap() != nil || o.pausing(a) != nil || wraps && !o.speaksFor(v) {
					continue
				}
				given[o.ID] = true
				if !yield(o) {
					return false
				}
			}
			return true
		}
		current, rest := t.keys.besides(v)
		_ = give(current) && give(t.others(ctx, a, v)) && give(rest)
	}
}

// speaksFor tells whether wraps under a version say something of those under another.
func (o *Version) speaksFor(v *Version) bool { return v.Suite.asymmetric() || !o.Suite.asymmetric() }

// unlike is 1 where v is of a pair and o is not, else 0.
func (v *Version) unlike(o *Version) int {
	if v.Suite.asymmetric() && !o.Suite.asymmetric() {
		return 1
	}
	return 0
}

// besides returns the versions that were read, beside one: the current ones of other keys,
// and the rest.
func (r *keyring) besides(v *Version) (current, rest []*Version) {
	for _, o := range r.versions() {
		if o.Key != v.Key && r.isCurrent(o) {
			current = append(current, o)
		} else {
			rest = append(rest, o)
		}
	}
	for _, list := range [][]*Version{current, rest} {
		slices.SortFunc(list, func(a, b *Version) int {
			return cmp.Or(v.unlike(a)-v.unlike(b), cmp.Compare(b.opened.Load(), a.opened.Load()))
		})
	}
	return current, rest
}

// served tells whether another version was served by a call that began after a time.
func (r *keyring) served(v *Version, after int64, wraps bool) bool {
	return slices.ContainsFunc(r.versions(), func(o *Version) bool {
		if wraps {
			return o.ID != v.ID && o.speaksFor(v) && o.wrapped.Load() > after
		}
		return o.ID != v.ID && o.opened.Load() > after
	})
}

// others returns the current versions of some other keys of the catalogue.
func (t *Token) others(ctx context.Context, a *attachment, v *Version) (all []*Version) {
	keys := new([]*Key) // the worker's, until it is done
	if t.cfg.Catalogue != nil {
		*keys, _ = t.cfg.Catalogue.records()
	} else if t.do(ctx, a, func(w *worker) (err error) {
		*keys, err = someRecords(w.session, maxRecords)
		return err
	}) != nil {
		return nil
	}
	for _, k := range *keys {
		if o, err := k.Version(k.Current); err == nil && k.Name != v.Key {
			all = append(all, o)
		}
	}
	return all
}

// someRecords reads the records of a few keys, as far as they can be read.
func someRecords(s cryptoki.Session, limit int) (keys []*Key, err error) {
	objects, err := s.Find(recordsOf(""), limit)
	for _, o := range objects {
		value, err := s.Attribute(o, pkcs11.CKA_VALUE)
		if err != nil {
			continue
		}
		if k, err := parseKey(value); err == nil {
			keys = append(keys, k)
		}
	}
	return keys, err
}
