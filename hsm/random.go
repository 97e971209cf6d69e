package hsm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

const (
	// MaxRandom is how many bytes one Random gives at most.
	MaxRandom = 1024
	// randomBlock is what a stuck generator is recognised by, and the least that the
	// token is asked for.
	randomBlock = 16
)

// Random fills dst, 1 to MaxRandom bytes, with the token's own random. It takes one
// session of those for operations. A generator that gives zeros, or the same again, is
// Broken; a token without one is Invalid. After an error dst is as it was.
func (t *Token) Random(ctx context.Context, dst []byte) error {
	if len(dst) == 0 || len(dst) > MaxRandom {
		return errorf(Invalid, nil, "%d random bytes: 1 to %d are possible", len(dst), MaxRandom)
	}
	var last error
	for range attempts {
		a, err := t.attached(ctx)
		if err != nil {
			return err
		}
		if err = t.draw(ctx, a, dst); err == nil {
			return nil
		}
		var final bool
		if final, err = t.judgeRandom(ctx, a, err); final {
			return err
		}
		last = err
	}
	return errorf(Unavailable, last, "tried %d times", attempts)
}

// draw takes random in one session, or in another where that was lost before.
func (t *Token) draw(ctx context.Context, a *attachment, dst []byte) error {
	since := t.now()
	return a.inAnother(ctx, since, func() error { return t.drawOnce(ctx, a, since, dst) })
}

// drawOnce takes random in one session. The module writes to the session's own memory,
// since a caller whose time is up leaves with dst.
func (t *Token) drawOnce(ctx context.Context, a *attachment, since int64, dst []byte) error {
	w, err := a.acquire(ctx)
	if err != nil {
		return err
	}
	n := max(len(dst), randomBlock)
	_, left, err := w.run(ctx, job{since: since, do: func(w *worker) error { return w.session.Random(w.out[:n]) }})
	if left {
		return err
	}
	if err != nil {
		a.discard(w)
		return err
	}
	if err = t.random.check(w.out[:n]); err == nil {
		copy(dst, w.out[:n])
	}
	w.cleanAfter(n)
	a.release(w)
	return err
}

// judgeRandom says what a failure means. Unless it is final another try may help.
func (t *Token) judgeRandom(ctx context.Context, a *attachment, err error) (final bool, _ error) {
	if known := (*Error)(nil); errors.As(err, &known) && known.Kind != Unavailable || ctx.Err() != nil {
		return true, err
	}
	if noGenerator(err) {
		return true, errorf(Invalid, err, "the token has no random number generator")
	}
	switch stepFor(err) {
	case newSession, askCanary: // what is wrong with a token that wraps is not to be found out here
		return false, err
	case fewer:
		a.pause(ctx)
		return false, err
	case loginAgain:
		if err := t.relogin(ctx, a); err != nil {
			return KindOf(err) == Unauthenticated, err
		}
		return false, err
	case reconnect:
		a.breaks(errorf(Unavailable, err, "the connection to the token is lost"))
		return false, err
	case fixPIN:
		return true, errorf(Unauthenticated, err, "the token wants another PIN")
	case giveUp, refuse, findAgain:
	}
	if a.cause() != nil {
		return false, err
	}
	return true, errorf(Broken, err, "the token gives no random")
}

// noGenerator tells whether the token says of itself that it gives no random.
func noGenerator(err error) bool {
	return errors.Is(err, cryptoki.Error(pkcs11.CKR_RANDOM_NO_RNG)) || errors.Is(err, cryptoki.Error(pkcs11.CKR_FUNCTION_NOT_SUPPORTED))
}

// generator remembers just enough of a token's random to see that it is stuck.
type generator struct {
	mu   sync.Mutex
	last [sha256.Size]byte // mu guards last: the hash of how the last answer began
}

// check refuses random with a block of zeros or one that is there twice in a row, and
// an answer that begins as the one before: by chance each happens once in 2^128.
func (g *generator) check(random []byte) error {
	var before []byte
	for at := 0; at+randomBlock <= len(random); at += randomBlock {
		block := random[at : at+randomBlock]
		if bytes.Equal(block, make([]byte, randomBlock)) {
			return errorf(Broken, nil, "the token's random number generator gives zeros")
		}
		if bytes.Equal(block, before) {
			return errStuck()
		}
		before = block
	}
	var sum [sha256.Size]byte
	erasing(func() { sum = sha256.Sum256(random[:randomBlock]) })
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.last == sum {
		return errStuck()
	}
	g.last = sum
	return nil
}

func errStuck() error {
	return errorf(Broken, nil, "the token's random number generator gives the same again")
}
