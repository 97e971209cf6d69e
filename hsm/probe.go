package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"
)

// Trial is how a token did with a suite.
type Trial struct {
	Suite Suite
	// Err says why the suite cannot be used; nil where it can.
	Err error
	// IV is the style of the initialization vectors of GCM, else "".
	IV string
	// Pair is how long a wrap and an unwrap of 32 bytes took.
	Pair time.Duration
	// RSABits is the size of the RSA keys that the token makes, 0 for other suites.
	RSABits int
	// Signs says that the token makes no private key which decrypts and cannot sign.
	Signs bool
	// OnToken says that the token makes no keys that end with their session: the
	// trial had one of another kind, and destroyed it.
	OnToken bool

	style IVStyle
}

// Probe is what a token can do.
type Probe struct {
	Module, Manufacturer, Library, Cryptoki string
	Token                                   TokenInfo
	Sessions                                int
	MaxSessions                             uint
	Mechanisms                              int
	Trials                                  []Trial
	// Use is the suite that a new key gets; 0 where none works.
	Use Suite
	// Random says why the token gives no random; nil where it does.
	Random error
}

// Probe tries every suite, and the random. It leaves nothing on the token.
func (t *Token) Probe(ctx context.Context) (Probe, error) {
	a, err := t.attached(ctx)
	if err != nil {
		return Probe{}, err
	}
	p := Probe{Module: t.cfg.Module, Token: tokenInfo(a.slot, a.info), Sessions: cap(a.places), MaxSessions: a.info.MaxSessions}
	info := new(Probe)
	err = t.manage(ctx, func(*worker) error {
		m, err := t.module.Info()
		if err != nil {
			return err
		}
		list, err := t.module.Mechanisms(a.slot)
		*info = Probe{Manufacturer: m.Manufacturer, Library: m.Description + " " + m.Library.String(), Cryptoki: m.Cryptoki.String(), Mechanisms: len(list)}
		return err
	})
	if err != nil {
		return Probe{}, err
	}
	p.Manufacturer, p.Library, p.Cryptoki, p.Mechanisms = info.Manufacturer, info.Library, info.Cryptoki, info.Mechanisms
	for _, s := range append(Suites(), OAEPSHA1) {
		trial, err := t.trial(ctx, s)
		if ctx.Err() != nil {
			return p, context.Cause(ctx)
		}
		if err != nil && KindOf(err) == Unavailable {
			return p, err
		}
		if trial.Err = err; err == nil && p.Use == 0 && s != OAEPSHA1 {
			p.Use = s
		}
		p.Trials = append(p.Trials, trial)
	}
	p.Random = t.Random(ctx, make([]byte, 32))
	if ctx.Err() != nil {
		return p, context.Cause(ctx)
	}
	if p.Random != nil && KindOf(p.Random) == Unavailable {
		return p, p.Random
	}
	return p, nil
}

// trialLabel is that of trial keys on the token. No key's has one slash only.
const trialLabel = labelPrefix + "trial"

// trial tests a suite: what it wraps opens, and nothing else does. Keys on the token
// are tried only where it makes none that end with their session.
func (t *Token) trial(ctx context.Context, s Suite) (Trial, error) {
	result, err := t.tryRecipes(ctx, s, false)
	if mishap(err) {
		result, err = t.tryRecipes(ctx, s, false)
	}
	if refused(err) {
		whole, end := t.toTheEnd(ctx)
		defer end()
		result, err = t.tryRecipes(whole, s, true)
		if mishap(err) && !refused(err) && ctx.Err() == nil && !errors.As(err, new(trialLeft)) {
			result, err = t.tryRecipes(whole, s, true)
		}
	}
	if err != nil {
		return Trial{Suite: s}, err
	}
	return result, nil
}

// tryRecipes tests a suite with the first recipe that the token takes.
func (t *Token) tryRecipes(ctx context.Context, s Suite, onToken bool) (result Trial, err error) {
	for _, r := range s.recipes() {
		r.label, r.onToken = trialLabel, onToken
		if result, err = t.tryRecipe(ctx, s, r); !refused(err) {
			break
		}
	}
	return result, err
}

func (t *Token) tryRecipe(ctx context.Context, s Suite, r recipe) (Trial, error) {
	v := &Version{Suite: s}
	var errs [2]error
	v.ID, errs[0] = newID()
	v.macID, errs[1] = newID()
	if err := errors.Join(errs[:]...); err != nil {
		return Trial{}, err
	}
	result := &Trial{Suite: s, RSABits: r.rsaBits, Signs: r.signs, OnToken: r.onToken}
	err := t.manage(ctx, func(w *worker) error {
		w.spoiled = true
		// Not later, beside the next trial: a module may forget its keys while another
		// session looks for some, and crash; or hold a key when it is destroyed.
		defer w.hangUp()
		if r.onToken {
			// There may be one of an attempt that was cut off.
			if err := destroy(w.session, v); err != nil {
				return err
			}
		}
		return result.run(w, v, r)
	})
	if !r.onToken {
		return *result, err
	}
	if left := t.remove(ctx, v); left != nil {
		return Trial{}, errorf(KindOf(left), trialLeft{left}, "the key of a trial, %s with the ID %x, may still be on the token: delete it", trialLabel, v.ID)
	}
	return *result, err
}

// trialLeft is why the key of a trial was not destroyed.
type trialLeft struct{ error }

func (l trialLeft) Unwrap() error { return l.error }

// run makes the keys of v and wraps with them.
func (result *Trial) run(w *worker, v *Version, r recipe) error {
	keys, err := generate(w.session, v, r)
	if err != nil {
		return err
	}
	if v.Suite == GCM {
		if result.style, err = ivStyle(w, keys); err != nil {
			return err
		}
		result.IV = result.style.String()
	}
	began := time.Now()
	if err := roundTrip(w, v.Suite, result.style, keys); err != nil {
		return err
	}
	result.Pair = time.Since(began)
	return refuses(w, v.Suite, result.style, keys)
}

// trialMaterial is what a trial wraps.
func trialMaterial() ([]byte, error) {
	b := make([]byte, 32)
	_, err := rand.Read(b)
	return b, err
}

// sealTrial leaves the ciphertext in w.in.
func sealTrial(w *worker, s Suite, style IVStyle, k handles, material []byte) (int, error) {
	w.aad = append(w.aad[:0], "kms-agent trial"...)
	w.iv = w.ivRoom[:0]
	n, err := s.seal(w, style, k, copy(w.in, material))
	if err != nil {
		return 0, err
	}
	w.aad = append(w.aad[:0], "kms-agent trial"...)
	return copy(w.in, w.out[:n]), nil
}

func roundTrip(w *worker, s Suite, style IVStyle, k handles) error {
	material, err := trialMaterial()
	if err != nil {
		return err
	}
	n, err := sealTrial(w, s, style, k, material)
	if err != nil {
		return err
	}
	if !s.fits(n) || len(w.iv) != s.ivLength(style) {
		return fmt.Errorf("a ciphertext of %d bytes", n)
	}
	if bytes.Contains(w.in[:n], material) {
		return errors.New("the ciphertext holds what it should hide")
	}
	if n, err = s.open(w, k, n); err != nil {
		return err
	}
	if !bytes.Equal(w.out[:n], material) {
		return errors.New("what was wrapped opens to something else")
	}
	return nil
}

// refuses checks that nothing opens with other bound data. It must be the last: an
// operation that failed may stay active in the session.
func refuses(w *worker, s Suite, style IVStyle, k handles) error {
	material, err := trialMaterial()
	if err != nil {
		return err
	}
	n, err := sealTrial(w, s, style, k, material)
	if err != nil {
		return err
	}
	w.aad = append(w.aad[:0], "kms-agent another"...)
	if _, err := s.open(w, k, n); err == nil {
		return errors.New("what was wrapped opens with other bound data")
	}
	return nil
}
