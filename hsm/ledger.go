package hsm

import (
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/renameio/v2"
	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

const (
	// ledgerRounds make a guess of the PIN from the ledger dear; who can read it can
	// mostly read the PIN too.
	ledgerRounds = 50_000
	// maxAttempts is how many PINs are remembered per token.
	maxAttempts = 64
	// ledgerPoll is how often a refused PIN's source is looked at.
	ledgerPoll = time.Second
)

// Ledger remembers which PINs were tried with which token: tokens lock after three
// wrong ones, and a process that is started again and again would try for ever. A
// PIN is tried once until the token has accepted it; the attempt is written down
// before it is made. It implements Login. Processes may share its file.
type Ledger struct {
	// Path is the file, in a directory of this process's own.
	Path string
	// PIN is where the PIN is.
	PIN PINSource
	// Retry lets a PIN be tried that was refused, or whose outcome is not known.
	Retry bool

	seen atomic.Pointer[seen]
}

// seen is what PIN and ledger were when a login was tried last, or refused.
type seen struct{ pin, ledger string }

// ledger is the content of the file.
type ledger struct {
	Format int                  `json:"format"`
	Salt   []byte               `json:"salt"`
	Tokens map[string][]attempt `json:"tokens"` // by serial number and label
}

// attempt is what is known of one PIN.
type attempt struct {
	PIN      []byte    `json:"pin_hash"`
	Tried    time.Time `json:"tried"`
	Accepted bool      `json:"accepted,omitempty"` // it was, once
	Refused  bool      `json:"refused,omitempty"`  // it was, last
}

// Attempt implements Login.
func (l *Ledger) Attempt(token TokenInfo, log func(pin []byte) error) error {
	unlock, err := lockFile(l.Path+".lock", lockPatience)
	if err != nil {
		return errorf(Unavailable, err, "the ledger of logins %s", l.Path) // nobody refused anything
	}
	defer unlock()
	before := l.PIN.stamp() // what comes while it is read is news
	defer func() { l.seen.Store(&seen{pin: before, ledger: stamp(l.Path)}) }()
	return l.classified(l.PIN.read(func(pin []byte) error { return l.attempt(token, pin, log) }))
}

// classified gives an error about the PIN's source its kind.
func (l *Ledger) classified(err error) error {
	if err == nil || errors.As(err, new(*Error)) || errors.As(err, new(cryptoki.Error)) {
		return err
	}
	return errorf(Unauthenticated, err, "")
}

func (l *Ledger) attempt(token TokenInfo, pin []byte, log func(pin []byte) error) error {
	book, err := l.read()
	if err != nil {
		return err
	}
	name := token.Serial + " " + token.Label
	hash, err := book.hash(name, pin)
	if err != nil {
		return err
	}
	a := book.find(name, hash)
	if err := l.allowed(token, a, book.refusedBefore(name)); err != nil {
		return err
	}
	tried := a.Tried
	a.Tried = time.Now().UTC().Truncate(time.Second)
	if err := l.write(book); err != nil { // before, so that no crash forgets it
		return errorf(Unavailable, err, "the login is not tried because it cannot be written down in %s", l.Path)
	}
	err = log(pin)
	switch {
	case err == nil, errors.Is(err, cryptoki.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)):
		if a.Accepted && !a.Refused {
			return err
		}
		if err == nil {
			a.Accepted, a.Refused = true, false
		} else {
			a.Tried = tried // that somebody is logged in says nothing of the PIN: it was not tried
		}
	case stepFor(err) == fixPIN:
		a.Refused, err = true, fmt.Errorf("that of %v: %w", l.PIN, err)
	default:
		return err // the token did not say anything of the PIN
	}
	return errors.Join(err, l.write(book))
}

// refusedBefore tells whether the token has refused a PIN of ours.
func (b *ledger) refusedBefore(token string) bool {
	return slices.ContainsFunc(b.Tokens[token], func(a attempt) bool { return a.Refused })
}

// allowed returns why a PIN may not be tried. A token that counts wrong PINs, where
// ours is known to be one of them, takes another; never its last try.
func (l *Ledger) allowed(token TokenInfo, a *attempt, ours bool) error {
	known := a.Accepted && !a.Refused
	switch {
	case token.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return errorf(Unauthenticated, nil, "the PIN of token %q is locked: its security officer must set a new one", token.Label)
	case l.Retry:
		return nil
	case token.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return errorf(Unauthenticated, nil, "the token %q has one try left before its PIN is locked: make sure that the PIN is right and run 'kms-agent hsm probe --retry-pin'", token.Label)
	case known:
		return nil
	case a.Refused:
		return errorf(Unauthenticated, nil, "the token %q has refused this PIN on %s; it is not tried again, so that the token does not lock: put the right PIN in its place (%v), or, if the token was given this one meanwhile, run 'kms-agent hsm probe --retry-pin'",
			token.Label, a.Tried.Format(time.RFC3339), l.PIN)
	case !a.Tried.IsZero():
		return errorf(Unauthenticated, nil, "this PIN was tried with token %q on %s, and the outcome is not known; it is not tried again, so that the token does not lock: "+
			"make sure that it is right and run 'kms-agent hsm probe --retry-pin'", token.Label, a.Tried.Format(time.RFC3339))
	case token.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0 && !ours:
		return errorf(Unauthenticated, nil, "wrong PINs were tried with token %q lately, and this one was never accepted: make sure that it is right and run 'kms-agent hsm probe --retry-pin'", token.Label)
	}
	return nil
}

// hash returns what stands for a PIN. The PIN itself goes through a MAC only, whose
// state is erased where Go can.
func (b *ledger) hash(token string, pin []byte) (hash []byte, err error) {
	erasing(func() {
		mac := hmac.New(sha256.New, b.Salt)
		_, _ = mac.Write(pin)
		hash = mac.Sum(nil)
	})
	return pbkdf2.Key(sha256.New, string(hash), append(slices.Clone(b.Salt), token...), ledgerRounds, sha256.Size)
}

// find returns what is known of a PIN; a new attempt where that is nothing.
func (b *ledger) find(token string, hash []byte) *attempt {
	list := b.Tokens[token]
	for i := range list {
		if subtle.ConstantTimeCompare(list[i].PIN, hash) == 1 {
			return &list[i]
		}
	}
	if len(list) >= maxAttempts {
		list = list[1:]
	}
	list = append(list, attempt{PIN: hash})
	b.Tokens[token] = list
	return &list[len(list)-1]
}

// Changed implements Login: it returns when the PIN's source is another one than at
// the last attempt, or another process has learned something of the PIN.
func (l *Ledger) Changed(ctx context.Context) error {
	before := l.seen.Load()
	if before == nil {
		before = &seen{pin: l.PIN.stamp(), ledger: stamp(l.Path)}
	}
	tick := time.NewTicker(ledgerPoll)
	defer tick.Stop()
	for {
		if l.PIN.stamp() != before.pin || stamp(l.Path) != before.ledger {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

func (l *Ledger) read() (*ledger, error) {
	b, err := os.ReadFile(l.Path)
	if errors.Is(err, fs.ErrNotExist) {
		book := &ledger{Format: 1, Salt: make([]byte, 16), Tokens: map[string][]attempt{}}
		_, err := rand.Read(book.Salt)
		return book, err
	}
	if err != nil {
		return nil, errorf(Unauthenticated, err, "the ledger of logins cannot be read, so no login is tried")
	}
	var book ledger
	if err := json.Unmarshal(b, &book); err != nil || book.Format != 1 || len(book.Salt) < 16 {
		return nil, errorf(Unauthenticated, err, "the ledger of logins %s is damaged, so no login is tried: make sure that the PIN is right, and remove the file", l.Path)
	}
	if book.Tokens == nil {
		book.Tokens = map[string][]attempt{}
	}
	return &book, nil
}

func (l *Ledger) write(book *ledger) error {
	b, err := json.Marshal(book)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(l.Path, b, 0o600); err != nil {
		return err
	}
	return syncDirectory(filepath.Dir(l.Path))
}
