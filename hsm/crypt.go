package hsm

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"runtime"
	"time"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// attempts is how often an operation is tried: lost sessions, handles, logins and
// connections come one upon the other. What may be the data's fault does not count.
const attempts = 4

// Wrap appends to dst the material, 1 to MaxMaterial bytes, wrapped under version v
// and bound to aad. plaintext is read during the call only.
func (t *Token) Wrap(ctx context.Context, v *Version, dst, plaintext, aad []byte) ([]byte, error) {
	if len(plaintext) == 0 || len(plaintext) > MaxMaterial {
		return nil, errorf(Invalid, nil, "%d bytes of key material: 1 to %d are possible", len(plaintext), MaxMaterial)
	}
	if err := v.mayWrap(); err != nil {
		return nil, err
	}
	h := v.header()
	if len(plaintext) > v.takes {
		h.flags |= flagHybrid
	}
	out, err := t.crypt(ctx, v, h, dst, plaintext, nil, aad, false)
	if err != nil {
		return nil, t.recorded(ctx, v, err)
	}
	return out, nil
}

// Unwrap appends to dst the material of what Wrap made under version v with the
// same aad. The caller owns, and clears, the result.
func (t *Token) Unwrap(ctx context.Context, v *Version, dst, wrapped, aad []byte) ([]byte, error) {
	if err := v.mayUnwrap(); err != nil {
		return nil, err
	}
	h, iv, ciphertext, err := parseWrapped(wrapped)
	if err == nil && h.id != v.ID {
		return nil, errorf(BadCiphertext, errOpen, "it names the key with the ID %x, and version %d of key %s has the ID %x", h.id, v.Number, v.Key, v.ID)
	}
	if err != nil || h.suite != v.Suite || h.id != v.ID || h.version != v.Number || len(iv) != v.Suite.ivLength(v.style) ||
		h.flags&flagHybrid == 0 && !v.Suite.fits(len(ciphertext)) || len(ciphertext) > inSize {
		return nil, errOpen
	}
	out, err := t.crypt(ctx, v, h, dst, ciphertext, iv, aad, true)
	if err != nil {
		return nil, t.recorded(ctx, v, err)
	}
	return out, nil
}

// explanation is why a version is refused, by its record; nil where that does not tell.
type explanation struct {
	until int64 // by the token's now
	err   error
}

// explained is how long an explanation lasts.
const explained = time.Second

// recorded is why a version is refused by what its record says now, where that tells more
// than the token does: another host may have disabled it a moment ago. One caller reads it,
// once in a while.
func (t *Token) recorded(ctx context.Context, v *Version, err error) error {
	if KindOf(err) != KeyUnusable && !errors.Is(err, errNoPublic) || errors.As(err, new(uncounted)) {
		return err
	}
	known := v.explained.Load()
	if (known == nil || t.now() >= known.until) && v.explaining.CompareAndSwap(false, true) {
		next := &explanation{}
		if k, unread := t.readKey(ctx, v.Key); unread == nil {
			if now, gone := k.Version(v.Number); gone == nil && now.ID == v.ID {
				next.err = now.mayUnwrap()
			}
		}
		next.until = t.now() + int64(explained)
		v.explained.Store(next)
		v.explaining.Store(false)
		known = next
	}
	if known != nil && known.err != nil {
		return known.err
	}
	return err
}

// crypt does one operation, with what it takes to do it: it is tried again where
// that can help, and never for the sake of what a caller sent.
func (t *Token) crypt(ctx context.Context, v *Version, h header, dst, in, iv, aad []byte, unwrap bool) ([]byte, error) {
	var last error
	var a *attachment
	since := t.now()
	var d doubts
	for tries := 0; tries-d.data < attempts; tries++ {
		var err error
		if a, err = t.attached(ctx); err != nil {
			return nil, err
		}
		keys, err := t.bind(ctx, a, v, !unwrap)
		if unwrap { // doubts of a wrap are not timed
			d.at = t.now()
		}
		theirs := unwrap && err == nil // what fails from here on may be what they sent
		if err == nil {
			var out []byte
			if out, err = t.onceSince(ctx, a, v, h, keys, since, dst, in, iv, aad, unwrap); err == nil {
				a.works(!unwrap)
				return out, nil
			}
		}
		if last = err; errors.Is(err, errDoubted) {
			if err = v.awaitLook(ctx, a, !unwrap); err == nil {
				ctx = as(ctx, bounced)
				continue
			}
		}
		if !unwrap && stepFor(err) != giveUp {
			a.failed.Store(true)
		}
		var final bool
		if final, err = t.judge(ctx, a, v, err, theirs, &d); final {
			return nil, err
		}
		last = err
	}
	return nil, t.inVain(ctx, a, v, !unwrap, attempts+d.data, last)
}

// inVain says what it means that a version was tried again and again.
func (t *Token) inVain(ctx context.Context, a *attachment, v *Version, wrap bool, tries int, last error) error {
	_ = t.examineWith(ctx, a, v, wrap)
	if only := v.out(a, wrap); only != nil {
		return only
	}
	return errorf(Unavailable, last, "tried %d times", tries)
}

// count counts a wrap that is about to be made.
func (t *Token) count(v *Version) error {
	if t.cfg.Wraps == nil {
		return nil
	}
	if err := t.cfg.Wraps.Take(v); err != nil {
		return uncounted{err}
	}
	return nil
}

// uncounted is why a wrap must not be made: the version has made all it may, or nobody
// could count it. It says nothing of the token.
type uncounted struct{ error }

func (u uncounted) Unwrap() error { return u.error }

// uncount takes back what count counted for a wrap that was not begun.
func (t *Token) uncount(v *Version, unwrap bool) {
	if !unwrap && t.cfg.Wraps != nil {
		t.cfg.Wraps.untake(v)
	}
}

// begun tells whether a wrap that failed may have made use of the key.
func begun(err error) bool {
	var call *cryptoki.CallError
	return !errors.As(err, &call) || call.Function != "C_EncryptInit" && call.Function != "C_OpenSession"
}

// errDoubted says that a call was not made, as a look takes long at what failed with another.
var errDoubted = errors.New("the version is being examined")

// errStale says that handles were found in a login before: they may be those of other keys
// now.
var errStale = errors.New("somebody has logged in again since the key was looked for")

// stale returns errStale, after the login that is under way.
func (t *Token) stale(ctx context.Context, a *attachment) error {
	if len(a.login) > 0 {
		if err := t.relogin(ctx, a); err != nil && KindOf(err) == Unauthenticated {
			return err
		}
	}
	return errStale
}

// saysNothing tells errors that say nothing of a key or a token: a caller has left, or the
// handles are to be looked for again.
func saysNothing(err error) bool { return isCallers(err) || errors.Is(err, errStale) }

// once does one operation in one session, or in another where that was lost before. It counts
// wraps.
func (t *Token) once(ctx context.Context, a *attachment, v *Version, h header, keys handles, in, iv, aad []byte, unwrap bool) ([]byte, error) {
	return t.onceSince(ctx, a, v, h, keys, t.now(), nil, in, iv, aad, unwrap)
}

// onceSince is once as a part of the call of a caller, which began at since.
func (t *Token) onceSince(ctx context.Context, a *attachment, v *Version, h header, keys handles, since int64, dst, in, iv, aad []byte, unwrap bool) (out []byte, err error) {
	err = a.inAnother(ctx, since, func() (err error) {
		out, err = t.inSession(ctx, a, v, h, keys, since, dst, in, iv, aad, unwrap)
		return err
	})
	return out, err
}

func (t *Token) inSession(ctx context.Context, a *attachment, v *Version, h header, keys handles, since int64, dst, in, iv, aad []byte, unwrap bool) ([]byte, error) {
	if !unwrap {
		if err := t.count(v); err != nil {
			return nil, err
		}
	}
	w, err := a.acquire(ctx)
	if err != nil {
		t.uncount(v, unwrap)
		return nil, err
	}
	if v.look.Load() != nil && v.doubted(a) && roleOf(ctx) == caller {
		a.release(w)
		t.uncount(v, unwrap)
		return nil, errDoubted
	}
	if keys.epoch != a.epoch.Load() {
		a.release(w)
		t.uncount(v, unwrap)
		return nil, t.stale(ctx, a)
	}
	w.aad = h.appendAAD(w.aad[:0], aad)
	w.iv = w.ivRoom[:copy(w.ivRoom[:], iv)]
	n, left, err := w.run(ctx, job{
		since: since, suite: v.Suite, style: v.style, keys: keys, unwrap: unwrap, hybrid: h.flags&flagHybrid != 0, n: copy(w.in, in),
	})
	if left {
		return nil, err
	}
	if err != nil && !begun(err) {
		t.uncount(v, unwrap)
	}
	// What opens was opened by the right key, but for CBC: where its MAC was right another key
	// may have decrypted it.
	if keys.epoch != a.epoch.Load() && (err != nil || !unwrap || v.Suite == CBCHMAC) {
		a.discard(w)
		return nil, t.stale(ctx, a)
	}
	if err != nil {
		return nil, t.loginLost(ctx, w, keys.epoch, err)
	}
	if !unwrap && v.repeats(w.iv) {
		a.discard(w)
		return nil, errVector
	}
	if !unwrap {
		dst = append(append(h.append(dst), byte(len(w.iv))), w.iv...)
	}
	dst = append(dst, w.out[:n]...)
	w.cleanAfter(max(n, len(in)))
	began, tired := w.at, w.tired
	a.release(w)
	if unwrap {
		if v.look.Load() != nil && roleOf(ctx) == looker {
			v.took.Store(t.now() - began)
		}
		v.opened.Store(began)
	} else {
		v.wrapped.Store(began)
	}
	t.last.Store(began)
	if v.seen != 0 {
		t.used.Store(v)
	}
	if tired {
		runtime.Gosched()
	}
	return dst, nil
}

// doubts are failures of an operation that may have been the token's fault or the data's.
type doubts struct {
	n     int
	data  int           // how often the data of an unwrap failed while the canary opened: mostDoubts times at most
	at    int64         // when the last try began
	least time.Duration // how long a try and the canary took at least: the machine may stall, or others come between
	said  string        // what it failed with the last time, and
	same  int           // how often that was the same
}

// again tells whether the operation is tried again: once.
func (d *doubts) again() bool {
	d.n++
	return d.n == 1
}

const (
	// sameAgain is how often data must fail in the same way, while the canary opens each
	// time, to be told as bad: a token that loses calls fails in other ways, or not again.
	// It is less where a slow token leaves the caller no time for more.
	sameAgain, sameAtLeast = 3, 2
	slowly                 = 50 * time.Millisecond
	// mostDoubts is how often data may fail, in whatever ways.
	mostDoubts = 5
)

// damaged counts a failure of the data of an unwrap, and tells whether the data is bad as far
// as the token lets us know.
func (d *doubts) damaged(ctx context.Context, now int64, err error) bool {
	if said := err.Error(); d.said != said {
		d.said, d.same = said, 0
	}
	d.data++
	d.same++
	if took := time.Duration(now - d.at); d.data == 1 || took < d.least {
		d.least = took
	}
	if d.same >= sameAgain {
		return true
	}
	deadline, has := ctx.Deadline()
	return d.same >= sameAtLeast && d.least > slowly && has && time.Until(deadline) < 2*d.least
}

// judge says what the failure of an operation means. Unless it is final the
// operation is tried again; what may be the token's fault or the data's is tried
// again once, or more often before data is told as bad.
func (t *Token) judge(ctx context.Context, a *attachment, v *Version, err error, unwrap bool, d *doubts) (final bool, _ error) {
	if known := (*Error)(nil); errors.As(err, &known) && known.Kind != Unavailable {
		return true, err
	}
	if ctx.Err() != nil {
		return true, context.Cause(ctx)
	}
	if errors.As(err, new(uncounted)) || OfVersion(err) || errors.Is(err, errSlow) {
		return true, err
	}
	if s := stepFor(err); v.byPublic(err) && (s == giveUp || s == refuse) {
		v.retest(a) // there may be another
		if d.again() {
			return false, err
		}
		return true, v.noPublic(err)
	}
	wraps := !unwrap && v.bound(a, false) != nil // else it is the canary that failed
	switch t.stepOf(a, v, err, unwrap) {
	case newSession:
		return false, err
	case fewer:
		a.pause(ctx)
		return false, err
	case findAgain:
		if !errors.Is(err, errStale) { // else what is bound now is of another login
			v.unbind(a)
		}
		return false, err
	case loginAgain:
		if err := t.relogin(ctx, a); err != nil {
			return KindOf(err) == Unauthenticated, err
		}
		return false, err
	case reconnect:
		if t.ask(ctx, a, v, false) != well {
			return false, a.lost(err)
		}
		if d.again() {
			return false, err
		}
		return true, v.outage(a, err, false)
	case refuse:
		if unwrap {
			return true, errOpen
		}
		if t.ask(ctx, a, v, wraps) == well {
			return true, v.outage(a, err, wraps)
		}
		return true, v.leftAlone(a, wraps, errorf(Broken, err, "the token does not take what it took before"))
	case askCanary:
		return t.doubt(ctx, a, v, err, unwrap, d)
	case fixPIN:
		return true, errorf(Unauthenticated, err, "the token wants another PIN")
	case giveUp:
	}
	if a.cause() != nil {
		return false, err
	}
	if code := cryptoki.Error(0); errors.As(err, &code) && !code.Policy() && t.ask(ctx, a, v, wraps) == well {
		return true, v.outage(a, err, wraps)
	}
	return true, v.leftAlone(a, wraps, refusal(err))
}

// leftAlone is why a version does not wrap, for a while: what is asked and tested uses up
// wraps, also of others. What its policy says is no such reason.
func (v *Version) leftAlone(a *attachment, wraps bool, err error) error {
	if wraps && KindOf(err) == Broken {
		v.tests(a, a.token.now(), err)
	}
	return err
}

// stepOf is stepFor for an operation with a version. Where its keys are known a look tells
// what is wrong. What somebody gave us to unwrap is no reason for another connection and
// says nothing of the key, whatever the token makes of it.
func (t *Token) stepOf(a *attachment, v *Version, err error, unwrap bool) step {
	s := stepFor(err)
	if v.bound(a, false) == nil {
		return s
	}
	if unwrap && s == giveUp && errors.As(err, new(cryptoki.Error)) || s == reconnect || !unwrap && mayBeToken(err) {
		return askCanary
	}
	return s
}

// doubt lets a look decide between the data and the key or the token.
func (t *Token) doubt(ctx context.Context, a *attachment, v *Version, err error, unwrap bool, d *doubts) (final bool, _ error) {
	if a.cause() != nil || v.bound(a, false) == nil {
		return false, err // it will be looked for, with its canary
	}
	b, seen := t.look(ctx, a, v, !unwrap, true)
	if seen == nil {
		_, seen = b.serve(!unwrap)
	}
	if seen != nil {
		return t.judge(ctx, a, v, seen, false, d)
	}
	if ctx.Err() != nil {
		return true, context.Cause(ctx)
	}
	if errors.As(err, new(unmoved)) {
		return false, err // the login's matter, and never the data's
	}
	what := "wraps what it is tested with, and not this"
	switch {
	case unwrap && d.damaged(ctx, t.now(), err):
		return true, errOpen
	case unwrap && d.data < mostDoubts, !unwrap && d.again():
		return false, err
	case unwrap:
		what = "opens what it is tested with, and says now this and now that of something else"
	}
	only := errorf(Unavailable, err, "version %d of key %s %s: see docs/hsm.md for the code", v.Number, v.Key, what)
	only.VersionOnly = true // others may wrap what they want to: it is not remembered
	return true, only
}

// refusal is what it means that nothing helps.
func refusal(err error) error {
	var code cryptoki.Error
	switch {
	case !errors.As(err, &code):
		return errorf(Broken, err, "the module gave a wrong answer")
	case code.Policy():
		return errorf(KeyUnusable, err, "the token does not let this version of the key be used: see docs/hsm.md for the code")
	}
	return errorf(Broken, err, "the token does not take what it must: see docs/hsm.md for the code")
}

// openCanary opens the canary of v under keys.
func (t *Token) openCanary(ctx context.Context, a *attachment, v *Version, keys handles) error {
	h, iv, ciphertext, err := parseWrapped(v.canary)
	if err != nil {
		return errorf(Broken, err, "the canary of version %d", v.Number)
	}
	if h != v.header() || len(iv) != v.Suite.ivLength(v.style) || !v.Suite.fits(len(ciphertext)) {
		return errOpen // it is the canary of another version, or suite
	}
	out, err := t.once(ctx, a, v, h, keys, ciphertext, iv, v.canaryAAD(), true)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(out)
	clear(out)
	switch {
	case subtle.ConstantTimeCompare(sum[:], v.canarySum[:]) == 1:
		return nil
	case v.Suite == GCM, v.Suite == KWP: // no other key opens these
		return errorf(Broken, nil, "the token says that the canary of version %d of key %s opens, to something else: it must not be used", v.Number, v.Key)
	}
	return errOpen
}

// do runs a function in a session, again in another where that was lost before.
func (t *Token) do(ctx context.Context, a *attachment, f func(*worker) error) error {
	since := t.now()
	return a.inAnother(ctx, since, func() error { return t.doOnce(ctx, a, since, f) })
}

func (t *Token) doOnce(ctx context.Context, a *attachment, since int64, f func(*worker) error) error {
	w, err := a.acquire(ctx)
	if err != nil {
		return err
	}
	_, left, err := w.run(ctx, job{since: since, do: f})
	if left {
		return err
	}
	if w.spoiled || err != nil && errors.As(err, new(cryptoki.Error)) {
		a.discard(w)
		return err
	}
	w.clean()
	a.release(w)
	return err
}
