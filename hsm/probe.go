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
}

// Probe tries every suite with keys that end with their session.
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
		if KindOf(err) == Unavailable || ctx.Err() != nil {
			return p, err
		}
		if trial.Err = err; err == nil && p.Use == 0 && s != OAEPSHA1 {
			p.Use = s
		}
		p.Trials = append(p.Trials, trial)
	}
	return p, nil
}

// trial tests a suite: what it wraps opens, and nothing else does.
func (t *Token) trial(ctx context.Context, s Suite) (Trial, error) {
	result := &Trial{Suite: s}
	v := &Version{Key: "probe", Number: 1, Suite: s, State: Enabled, takes: s.takes(rsaBits / 8)}
	var err error
	if v.ID, err = newID(); err == nil {
		v.macID, err = newID()
	}
	if err != nil {
		return *result, err
	}
	err = t.manage(ctx, func(w *worker) error {
		w.spoiled = true
		keys, err := generate(w.session, v, false)
		if err != nil {
			return err
		}
		if s == GCM {
			if result.style, err = ivStyle(w, keys); err != nil {
				return err
			}
			result.IV = result.style.String()
		}
		began := time.Now()
		if err := roundTrip(w, s, result.style, keys); err != nil {
			return err
		}
		result.Pair = time.Since(began)
		return refuses(w, s, result.style, keys)
	})
	if err != nil {
		return Trial{Suite: s}, err
	}
	return *result, nil
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
