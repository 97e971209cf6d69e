package hsm

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

const (
	inSize    = MaxWrapped + 64
	outSize   = MaxWrapped + 64
	oneUseKey = 32
)

// Where a job stands. Whoever moves it from running cleans up after it.
const (
	jobRunning uint32 = iota
	jobDone
	jobLeft
)

// worker owns a session: one goroutine, the memory that the module reads and
// writes, and the session, which is closed after any error. A caller may leave;
// the worker stays with the module until it answers.
type worker struct {
	a       *attachment
	session cryptoki.Session
	open    bool
	used    int64         // when its session was last of use, by the token's now
	at      int64         // when the job began, or the last one
	rested  int64         // since when it has been busy, but for moments
	tired   bool          // who has it lets others run when it is given back
	spoiled bool          // the session is not for others
	short   bool          // the token had no session for it; the attachment's mu guards it
	place   chan struct{} // whose place it has, while it is not idle

	memory  slab
	in, out []byte // key material, packed or not
	ivRoom  [maxIV]byte
	iv      []byte // in ivRoom
	aad     []byte
	inner   []byte // of hybrids: what the key of one use encrypts

	job   job
	where atomic.Uint32
	began atomic.Int64 // when the call of the module began, 0 without one
	start chan struct{}
	done  chan struct{}
	n     int
	err   error
}

// job is what a worker does next: one of do, or a wrap or unwrap. The call that it is part of
// began at since.
type job struct {
	since  int64
	do     func(*worker) error
	suite  Suite
	style  IVStyle
	keys   handles
	unwrap bool
	hybrid bool
	n      int
}

func newWorker(a *attachment) (*worker, error) {
	memory, err := newSlab(inSize + outSize)
	if err != nil {
		return nil, err
	}
	w := &worker{
		a: a, memory: memory, in: memory[:inSize:inSize], out: memory[inSize : inSize+outSize : inSize+outSize],
		start: make(chan struct{}), done: make(chan struct{}, 1),
	}
	go w.loop()
	return w, nil
}

// run does j. When ctx ends first it returns ctx's cause and the worker goes back
// to its attachment by itself; otherwise the caller gives it back.
func (w *worker) run(ctx context.Context, j job) (n int, left bool, err error) {
	w.job = j
	if w.a.token.cfg.Stay || ctx.Done() == nil { // nobody leaves: the change of goroutines is spared
		n, err := w.performs()
		return n, false, err
	}
	w.where.Store(jobRunning)
	w.start <- struct{}{}
	select {
	case <-w.done:
		return w.n, false, w.err
	case <-ctx.Done():
	}
	if w.where.CompareAndSwap(jobRunning, jobLeft) {
		return 0, true, context.Cause(ctx)
	}
	<-w.done
	return w.n, false, w.err
}

// lostBefore is that a session, which had been of use before the call of a caller began, or
// the look, is told as lost at once. All that were idle may have been lost with it, and each is
// no failure of its own.
type lostBefore struct{ error }

func (l lostBefore) Unwrap() error { return l.error }

// usedBefore tells whether the session was last of use before a time.
func (w *worker) usedBefore(since int64) bool { return w.open && w.used < since }

// lost tells whether an error is that the session is lost, and was told at once.
func (w *worker) lost(err error) bool {
	lost := errors.Is(err, cryptoki.Error(pkcs11.CKR_SESSION_HANDLE_INVALID)) || errors.Is(err, cryptoki.Error(pkcs11.CKR_SESSION_CLOSED))
	return lost && time.Duration(w.a.token.now()-w.at) < lookPatience
}

// inAnother does a job of a caller's call, which began at since, again in another session
// where that was lost before: not beyond the caller's time, and not for long. Where the next
// one was lost, too, the sessions that were idle all the time are closed: so are they, it seems.
func (a *attachment) inAnother(ctx context.Context, since int64, job func() error) (err error) {
	var until int64
	for range cap(a.places) + spares {
		if err = job(); err == nil || ctx.Err() != nil || !errors.As(err, new(lostBefore)) {
			break
		}
		now := a.token.now()
		if until == 0 {
			until = now + int64(lookPatience)
		} else {
			a.closeIdle(since)
		}
		if now >= until {
			break
		}
	}
	return err
}

// lives says that what do does is another call of the module.
func (w *worker) lives() { w.began.Store(w.a.token.now()) }

// performs performs the job, and says since when it does. An error is a lostBefore where the
// session had been lost before the job.
func (w *worker) performs() (int, error) {
	now := w.a.token.now()
	w.tires(now)
	w.at = now
	w.began.Store(now)
	before := w.usedBefore(w.job.since)
	n, err := w.perform()
	w.began.Store(0)
	if err == nil {
		w.used = now
	} else if before && w.lost(err) {
		err = lostBefore{err}
	}
	return n, err
}

// stint is how long a session is busy before who has it lets others run: it may be one caller
// in a loop. When a goroutine has run for 10 ms the runtime (Go 1.26, retake) takes its processor
// away in call after call of C, which costs some percent of what SoftHSM can do.
const stint = 8 * time.Millisecond

// tires notes, when a job begins, whether the session has been busy for long.
func (w *worker) tires(now int64) {
	pause := time.Duration(now-w.at) > stint
	w.tired = !pause && time.Duration(now-w.rested) > stint
	if pause || w.tired {
		w.rested = now
	}
}

func (w *worker) loop() {
	for range w.start {
		w.n, w.err = w.performs()
		if w.where.CompareAndSwap(jobRunning, jobDone) {
			w.done <- struct{}{}
			continue
		}
		w.clean()
		if w.err != nil || w.spoiled {
			break
		}
		w.a.release(w)
	}
	w.began.Store(w.a.token.now())
	w.hangUp()
	w.began.Store(0)
	w.memory.free()
	w.a.gone(w)
}

// hangUp closes the session.
func (w *worker) hangUp() {
	if w.open {
		_ = w.session.Close() // mostly lost already
	}
	w.open = false
}

// clean erases key material.
func (w *worker) clean() { clear(w.memory) }

// padding is what suites use of the memory beyond material and ciphertext.
const padding = 128

// cleanAfter is clean for a job that took and gave so many bytes at most.
func (w *worker) cleanAfter(n int) {
	if w.job.hybrid {
		w.clean()
		return
	}
	clear(w.in[:min(n+padding, len(w.in))])
	clear(w.out[:min(n+padding, len(w.out))])
}

func (w *worker) perform() (int, error) {
	if !w.open {
		s, err := w.a.token.module.Open(w.a.slot)
		if stepFor(err) == fewer {
			w.a.shrinks(w)
		}
		if err != nil {
			return 0, err
		}
		w.session, w.open = s, true
	}
	switch j := &w.job; {
	case j.do != nil:
		return 0, j.do(w)
	case j.unwrap:
		return w.unwrap(j)
	default:
		return w.wrap(j)
	}
}

func (w *worker) wrap(j *job) (int, error) {
	w.iv = w.ivRoom[:0]
	if !j.hybrid {
		return w.seal(j, j.n)
	}
	if err := w.sealInner(j.n); err != nil {
		return 0, err
	}
	n, err := w.seal(j, oneUseKey)
	if err != nil {
		return 0, err
	}
	copy(w.out[2:], w.out[:n])
	binary.BigEndian.PutUint16(w.out, uint16(n))
	return 2 + n + copy(w.out[2+n:], w.inner), nil
}

// seal is the suite's, of a length that the suite gives: another cannot be opened.
func (w *worker) seal(j *job, n int) (int, error) {
	got, err := j.suite.seal(w, j.style, j.keys, n)
	if err == nil && !j.suite.gives(n, got) {
		return 0, fmt.Errorf("C_Encrypt: %d bytes of %v over %d", got, j.suite, n)
	}
	return got, err
}

// sealInner encrypts w.in[:n] with a key of one use, which it leaves in its place.
func (w *worker) sealInner(n int) (err error) {
	erasing(func() {
		key := w.out[:oneUseKey]
		if _, err = rand.Read(key); err != nil {
			return
		}
		var aead cipher.AEAD
		if aead, err = oneUse(key); err != nil {
			return
		}
		w.inner = aead.Seal(w.inner[:0], nil, w.in[:n], w.aad) //nolint:gosec // the AEAD makes the nonce
		clear(w.in[:n])
		copy(w.in, key)
	})
	return err
}

// oneUse is AES-256-GCM with a random nonce that stands before the ciphertext.
func oneUse(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(b)
}

func (w *worker) unwrap(j *job) (int, error) {
	if !j.hybrid {
		if !j.suite.fits(j.n) {
			return 0, errOpen
		}
		return j.suite.open(w, j.keys, j.n)
	}
	if j.n < 2 {
		return 0, errOpen
	}
	n := int(binary.BigEndian.Uint16(w.in))
	if 2+n > j.n || !j.suite.fits(n) {
		return 0, errOpen
	}
	w.inner = append(w.inner[:0], w.in[2+n:j.n]...)
	bound := len(w.aad) // a suite may append to it
	copy(w.in, w.in[2:2+n])
	got, err := j.suite.open(w, j.keys, n)
	if err != nil {
		return 0, err
	}
	if got != oneUseKey {
		return 0, errOpen
	}
	var opened []byte
	erasing(func() {
		var aead cipher.AEAD
		if aead, err = oneUse(w.out[:oneUseKey]); err == nil {
			opened, err = aead.Open(w.in[:0], nil, w.inner, w.aad[:bound])
		}
	})
	if err != nil || len(opened) > MaxMaterial {
		return 0, errOpen
	}
	clear(w.out)
	return copy(w.out, opened), nil
}

// isCallers tells whether it was a caller's own time that was up.
func isCallers(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
