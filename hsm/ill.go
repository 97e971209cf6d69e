package hsm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// strange says what a canary that does not open means: another key, or a token that
// is not well. It returns nil where it opens after all.
func (t *Token) strange(ctx context.Context, a *attachment, v *Version, keys handles, err error) error {
	if isCallers(err) || ctx.Err() != nil {
		return err
	}
	switch s := stepFor(err); {
	case errors.Is(err, errOpen), s == refuse:
	case s == askCanary:
		if another, ill := t.ill(ctx, a, v, keys, err); !another {
			return ill
		}
		if again := t.openCanary(ctx, a, v, keys); again == nil || stepFor(again) != askCanary && stepFor(again) != refuse && !errors.Is(again, errOpen) {
			return again // it was not the key
		}
	default:
		return err
	}
	return errorf(KeyUnusable, err, "the key with the ID %x is not the one that version %d of key %s was made with: it does not open its canary", v.ID, v.Number, v.Key)
}

// ill tells whether keys that do not open their canary are others, as they open what they
// wrap; that they do not wrap proves nothing. Else it returns what ails them: where the
// canary of another key opens, it is an outage of this version, and of the token if not.
func (t *Token) ill(ctx context.Context, a *attachment, v *Version, keys handles, err error) (another bool, _ error) {
	_, failed := t.try(ctx, a, v, keys)
	switch {
	case failed == nil:
		return true, nil
	case isCallers(failed):
		return false, failed
	case t.opensAnother(ctx, a, v):
		if t.openCanary(ctx, a, v, keys) == nil {
			return false, nil // the token had a bad moment
		}
		return false, v.ailing(err, failed)
	case ctx.Err() != nil:
		return false, context.Cause(ctx)
	}
	a.breaks(errorf(Unavailable, err, "the token neither opens its canary nor anything else"))
	return false, errorf(Unavailable, err, "the token is not well")
}

// ailing is the outage of one version.
func (v *Version) ailing(err, failed error) error {
	e := errorf(Unavailable, fmt.Errorf("%w (a test of the key: %w)", err, failed), "the token opens other keys' canaries, and not that of version %d of key %s: "+
		"see what the HSM's own log says of the key with the ID %x; restore it from the HSM's backup if it is damaged, or rotate with 'kms-agent hsm rotate %s' to encrypt meanwhile",
		v.Number, v.Key, v.ID, v.Key)
	e.VersionOnly = true
	return e
}

// opensOnly is the outage of a version's wraps.
func (v *Version) opensOnly(err error) error {
	e := errorf(Unavailable, err, "version %d of key %s opens, and does not wrap, while other keys do: see what the HSM's own log says of the key with the ID %x; "+
		"rotate with 'kms-agent hsm rotate %s' to encrypt meanwhile", v.Number, v.Key, v.ID, v.Key)
	e.VersionOnly = true
	return e
}

// illPause is how long a version is not looked at again that was found ill.
const illPause = time.Second

// illness is what was found of a version, by whom.
type illness struct {
	a     *attachment
	epoch int64
	until int64 // by the token's now
	err   error
}

func (v *Version) pause(a *attachment, err error) {
	v.illness.Store(&illness{a, a.epoch.Load(), a.token.now() + int64(illPause), err})
}

// pausing returns what ails a version that was looked at just now.
func (v *Version) pausing(a *attachment) error {
	if i := v.illness.Load(); i != nil && i.a == a && i.epoch == a.epoch.Load() && a.token.now() < i.until {
		return i.err
	}
	return nil
}

// maxWitnesses is how many other versions are asked for their canaries, maxWrapping how
// many of them to wrap.
const maxWitnesses, maxWrapping = 16, 4

// opensAnother tells whether the token opens the canary of another version.
func (t *Token) opensAnother(ctx context.Context, a *attachment, v *Version) bool {
	return t.another(ctx, a, v, maxWitnesses, func(o *Version) bool { _, err := t.testify(ctx, a, o); return err == nil })
}

// wrapsAnother tells whether another version wraps, with a secret key as that of v is.
func (t *Token) wrapsAnother(ctx context.Context, a *attachment, v *Version) bool {
	return t.another(ctx, a, v, maxWrapping, func(o *Version) bool {
		if o.Suite.asymmetric() {
			return false
		}
		keys, err := t.testify(ctx, a, o)
		return err == nil && t.selfTest(ctx, a, o, keys) == nil
	})
}

// another tells whether one of so many other versions does what is asked for: of those that
// were read, those first that opened their canary last, or of some of the catalogue.
func (t *Token) another(ctx context.Context, a *attachment, v *Version, most int, does func(*Version) bool) bool {
	asked := map[ID]bool{v.ID: true}
	some := func(all []*Version) bool {
		for _, o := range all {
			if asked[o.ID] || o.mayUnwrap() != nil {
				continue
			}
			if len(asked) > most || a.over() || ctx.Err() != nil {
				return false
			}
			asked[o.ID] = true
			if does(o) {
				return true
			}
		}
		return false
	}
	read := t.keys.versions()
	slices.SortFunc(read, func(a, b *Version) int { return cmp.Compare(b.opened.Load(), a.opened.Load()) })
	return some(read) || !a.over() && ctx.Err() == nil && some(t.others(ctx, a))
}

// testify has a version open its canary. It is looked for where it is not bound, and not
// bound by it: that is for those who want to use it.
func (t *Token) testify(ctx context.Context, a *attachment, o *Version) (handles, error) {
	if b := o.bound(a, false); b != nil {
		return b.keys, t.openCanary(ctx, a, o, b.keys)
	}
	found := new(handles) // the worker's, until it is done
	err := t.do(ctx, a, func(w *worker) (err error) {
		*found, err = o.find(w.session)
		return err
	})
	if err != nil {
		return handles{}, err
	}
	return *found, t.openCanary(ctx, a, o, *found)
}

// others returns the current versions of some keys of the catalogue.
func (t *Token) others(ctx context.Context, a *attachment) (all []*Version) {
	keys := new([]*Key) // the worker's, until it is done
	if t.cfg.Catalogue != nil {
		*keys, _ = t.cfg.Catalogue.records()
	} else if t.do(ctx, a, func(w *worker) (err error) {
		*keys, err = someRecords(w.session, maxWitnesses)
		return err
	}) != nil {
		return nil
	}
	for _, k := range *keys {
		if v, err := k.Version(k.Current); err == nil {
			all = append(all, v)
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
