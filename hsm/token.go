package hsm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// Config says which token is used, and how.
type Config struct {
	// Module is the absolute path of the vendor's PKCS#11 library.
	Module string
	// Reserved is the module's own start setting, mostly "" (NSS: its directory).
	Reserved string
	// Token selects the token: exactly one must match. Slot numbers are not stable
	// and serial numbers not always unique.
	Token URI
	// Login logs the session's application in, and asks nobody twice with a PIN that
	// was refused: see Ledger.
	Login Login
	// Catalogue holds what is known of the keys, for tokens that take no private data
	// objects; nil means that it stands on the token.
	Catalogue *CatalogueFile
	// Sessions is how many operations are under way at once; 0 means 8, or what the
	// token has, less three, and 2 where it has 4.
	Sessions int
	// HangAfter is how long one call of the module may take; 0 means 10 s.
	HangAfter time.Duration
	// Patience is how long operations wait for a connection that is being made anew,
	// from when it was lost; 0 means 1.5 s. In an outage that has lasted longer they
	// fail at once.
	Patience time.Duration
	// Stay keeps callers that are in the module until it answers, also when their time
	// is over: a call that nobody can leave needs no other goroutine, and is that much
	// faster. It is for programs whose own callers do not wait for them any longer than
	// they want to, as a plugin's host does. Callers that wait for a session or for the
	// token leave when their time is over all the same.
	Stay bool
	// Wraps counts what keys encrypt, and refuses what would be too much; nil: nobody does.
	Wraps *Counter
	// Events is told what happens to the connection. It may be nil.
	Events func(Event)
}

// Login gives the PIN to log, once, when it may be tried.
type Login interface {
	// Attempt calls log with the PIN, or returns why it may not be tried. token is
	// what the token says of itself just before.
	Attempt(token TokenInfo, log func(pin []byte) error) error
	// Changed is closed, or has a value, when there may be another PIN to try.
	Changed(ctx context.Context) error
}

// TokenInfo is what a token says of itself.
type TokenInfo struct {
	Label, Manufacturer, Model, Serial, Firmware string
	Slot                                         uint
	// Flags are CKF_ bits of CK_TOKEN_INFO.
	Flags uint
}

// Event is something that happened to the connection.
type Event struct {
	// Attached is true when the token is there, false when it is lost.
	Attached bool
	Token    TokenInfo
	Err      error
	// Retry is when the next attempt is made; 0 when there is another PIN to try.
	Retry time.Duration
}

const (
	defaultSessions  = 8
	defaultHangAfter = 10 * time.Second
	defaultPatience  = 1500 * time.Millisecond
	reconnectMin     = 100 * time.Millisecond
	reconnectMax     = 10 * time.Second
	// reconnectAsked is the least wait before an attempt that somebody has asked for.
	reconnectAsked = time.Second
	// idleCanary is how long the token may be idle: some close sessions after 15 s.
	idleCanary = 8 * time.Second
)

// Token is one token, attached and kept that way. It is safe for concurrent use. A
// process has one Token per module: a module is initialised once for all of it.
type Token struct {
	cfg    Config
	module *cryptoki.Module
	start  time.Time

	end   context.CancelFunc
	ended sync.WaitGroup
	dead  chan struct{}
	own   atomic.Int64 // when the keeper's call of the module began
	// guarded is the attachment, also while it ends.
	guarded atomic.Pointer[attachment]

	keys   keyring
	random generator
	used   atomic.Pointer[Version] // the last, for the canary
	last   atomic.Int64            // when the module last did something good

	hurry chan struct{} // somebody wants to know whether the token is back

	mu      sync.Mutex
	current *attachment   // mu guards current and what follows; nil while there is none
	changed chan struct{} // closed when current or lastErr change
	lastErr error         // why there is none
	lostAt  int64         // since when there is none that proved itself
	deadErr error
}

// Open loads the module and begins to attach the token; that goes on until it works
// or Close. An error means that it never can: the configuration or the module is
// wrong.
func Open(cfg Config) (*Token, error) {
	if cfg.Login == nil {
		return nil, errors.New("no login is configured")
	}
	cfg.HangAfter = orDefault(cfg.HangAfter, defaultHangAfter)
	cfg.Patience = orDefault(cfg.Patience, defaultPatience)
	if cfg.Sessions < 0 || cfg.Sessions > 1024 {
		return nil, fmt.Errorf("%d sessions: 1 to 1024 are possible, 0 means the default", cfg.Sessions)
	}
	module, err := cryptoki.Load(cfg.Module)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	t := &Token{
		cfg: cfg, module: module, start: time.Now(), end: cancel, dead: make(chan struct{}), changed: make(chan struct{}), hurry: make(chan struct{}, 1),
		lastErr: errors.New("the token has not been attached yet"),
	}
	t.ended.Go(func() { t.keep(ctx) })
	t.ended.Go(func() { t.guard(ctx) })
	return t, nil
}

// now is the time in nanoseconds, never 0. A suspended host does not count: its calls
// do not hang.
func (t *Token) now() int64 { return int64(time.Since(t.start)) + 1 }

func orDefault(d, fallback time.Duration) time.Duration {
	if d <= 0 {
		return fallback
	}
	return d
}

// Close ends all sessions and finalises the module. It does not wait for a module
// that hangs longer than HangAfter, and returns why the token is dead.
func (t *Token) Close() error {
	t.end()
	done := make(chan struct{})
	go func() { t.ended.Wait(); close(done) }()
	timer := time.NewTimer(2 * t.cfg.HangAfter)
	defer timer.Stop()
	select {
	case <-done:
		return t.Err()
	case <-t.dead:
		return t.Err()
	case <-timer.C:
		return errors.New("the module does not let go")
	}
}

// Dead is closed when a call does not come back from the module. Nothing but the
// end of the process helps then. Operations that are in the module wait on until
// their contexts end, or for ever where they stay; others fail at once.
func (t *Token) Dead() <-chan struct{} { return t.dead }

// Err returns why the token is dead; nil where it is not.
func (t *Token) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.deadErr
}

// guard watches for calls that do not come back: Go goes on while C hangs.
func (t *Token) guard(ctx context.Context) {
	tick := time.NewTicker(max(t.cfg.HangAfter/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := t.now()
		longest := time.Duration(0)
		if began := t.own.Load(); began != 0 {
			longest = time.Duration(now - began)
		}
		if a := t.guarded.Load(); a != nil {
			longest = max(longest, a.hung(now))
		}
		if longest > t.cfg.HangAfter {
			t.dies(errorf(Unavailable, nil, "a call of the module has not come back for %v: the process must end", longest.Round(time.Millisecond)))
			return
		}
	}
}

func (t *Token) dies(why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.deadErr == nil {
		t.deadErr, t.lastErr = why, why
		if t.current != nil {
			t.current.breaks(why)
			t.current = nil
		}
		close(t.dead)
		t.tell()
	}
}

// tell wakes who waits for a change. mu is held.
func (t *Token) tell() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// attached returns the attachment, and waits a little for one that is being made.
func (t *Token) attached(ctx context.Context) (*attachment, error) {
	t.mu.Lock()
	a, left := t.current, t.cfg.Patience
	if a == nil {
		left -= time.Duration(t.now() - t.lostAt)
	}
	t.mu.Unlock()
	if a != nil && !a.over() {
		return a, nil
	}
	return t.await(ctx, left)
}

// attachedAgain is attached for who wants to know whether the token is back: the next
// attempt is made soon, and waited for.
func (t *Token) attachedAgain(ctx context.Context) (*attachment, error) {
	t.mu.Lock()
	a := t.current
	t.mu.Unlock()
	if a != nil && !a.over() {
		return a, nil
	}
	select {
	case t.hurry <- struct{}{}:
	default:
	}
	return t.await(ctx, t.cfg.Patience)
}

// await waits for an attachment.
func (t *Token) await(ctx context.Context, patience time.Duration) (*attachment, error) {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		t.mu.Lock()
		a, changed, why, dead := t.current, t.changed, t.lastErr, t.deadErr
		t.mu.Unlock()
		if a != nil && !a.over() {
			return a, nil
		}
		if dead != nil {
			return nil, dead
		}
		if KindOf(why) == Unauthenticated {
			return nil, why // waiting does not help
		}
		select {
		case <-changed:
		case <-timer.C:
			return nil, errorf(Unavailable, why, "the token is not attached")
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// keep attaches the token and does so again whenever the attachment breaks. The
// pause grows while attachments prove nothing.
func (t *Token) keep(ctx context.Context) {
	pause := time.Duration(0)
	for ctx.Err() == nil {
		a, err := t.attach()
		if err == nil {
			t.guarded.Store(a)
			t.event(Event{Attached: true, Token: tokenInfo(a.slot, a.info)}) // before its first use
			t.publish(a, nil)
			err = t.watch(ctx, a)
			t.publish(nil, err)
			if !t.detach(a) {
				return
			}
			if errors.Is(err, errRenewed) {
				continue
			}
			if a.proved() {
				pause = 0
			}
		}
		t.publish(nil, err)
		if ctx.Err() != nil {
			return
		}
		pause = min(max(2*pause, reconnectMin), reconnectMax)
		wait := pause/2 + rand.N(pause/2+1) //nolint:gosec // jitter
		if KindOf(err) == Unauthenticated {
			wait = 0
		}
		t.event(Event{Err: err, Retry: wait})
		t.rest(ctx, err, wait)
	}
}

// rest waits before the next attempt, less long where Check asks for one. A refused PIN
// waits for another one.
func (t *Token) rest(ctx context.Context, err error, wait time.Duration) {
	if KindOf(err) == Unauthenticated {
		_ = t.cfg.Login.Changed(ctx)
		return
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	began := time.Now()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-t.hurry:
		timer.Reset(max(0, min(wait, reconnectAsked)-time.Since(began)))
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
	}
}

func (t *Token) event(e Event) {
	if t.cfg.Events != nil {
		t.cfg.Events(e)
	}
}

func (t *Token) publish(a *attachment, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.deadErr != nil {
		return
	}
	if t.current != nil && t.current.proved() {
		t.lostAt = t.now()
	}
	t.current = a
	if t.lastErr = err; a == nil && err == nil {
		t.lastErr = errors.New("the token is being detached")
	}
	t.tell()
}

// call calls the module, watched by guard. Only the keeper uses it.
func (t *Token) call(do func() error) error {
	t.own.Store(t.now())
	defer t.own.Store(0)
	return do()
}

// attach initialises the module, finds the token and logs in. Where it fails the
// module is not initialised afterwards.
func (t *Token) attach() (*attachment, error) {
	locks := false
	if err := t.call(func() (err error) { locks, err = t.module.Initialize(t.cfg.Reserved); return err }); err != nil {
		return nil, errorf(Unavailable, err, "initialise the module: can it read and write what its own configuration names?")
	}
	a, err := t.enter(locks)
	if err != nil {
		_ = t.call(t.module.Finalize) // only who is in may leave: some modules complain
	}
	return a, err
}

// enter finds the token and logs in. locks is what Initialize returned.
func (t *Token) enter(locks bool) (*attachment, error) {
	slot, info, err := t.find()
	if err != nil {
		return nil, err
	}
	var anchor cryptoki.Session
	if err := t.call(func() (err error) { anchor, err = t.module.Open(slot); return err }); err != nil {
		return nil, errorf(Unavailable, err, "open a session with token %q", info.Label)
	}
	if err := t.logIn(anchor, slot, &t.own, func() {}); err != nil {
		return nil, err
	}
	sessions, spare := t.sessions(info, locks)
	return newAttachment(t, slot, info, anchor, sessions, spare), nil
}

// find returns the slot of the one token that is meant.
func (t *Token) find() (slot uint, info cryptoki.Token, err error) {
	var slots []uint
	if err := t.call(func() (err error) { slots, err = t.module.Slots(); return err }); err != nil {
		return 0, info, errorf(Unavailable, err, "list the slots")
	}
	var seen []string
	found := 0
	for _, s := range slots {
		var i cryptoki.Token
		if err := t.call(func() (err error) { i, err = t.module.Token(s); return err }); err != nil {
			seen = append(seen, fmt.Sprintf("slot %d: %v", s, err))
			continue
		}
		if i.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			seen = append(seen, fmt.Sprintf("slot %d, whose token is not initialised", s))
			continue
		}
		seen = append(seen, fmt.Sprintf("%q (serial %s)", i.Label, i.Serial))
		if t.cfg.Token.MatchesToken(i.Label, i.Manufacturer, i.Model, i.Serial, s) {
			slot, info = s, i
			found++
		}
	}
	switch {
	case found == 1:
		return slot, info, nil
	case len(slots) == 0:
		return 0, info, errorf(Unavailable, nil, "the module shows no token: is the HSM reachable, and the module's own configuration right?")
	case found == 0:
		return 0, info, errorf(Unavailable, nil, "no token matches %s; there are: %s", t.cfg.Token, strings.Join(seen, ", "))
	}
	return 0, info, errorf(Invalid, nil, "%d tokens match %s; add the serial number, as in %s;serial=...: %s", found, t.cfg.Token, t.cfg.Token, strings.Join(seen, ", "))
}

// Info returns what the token says of itself, once it is attached.
func (t *Token) Info(ctx context.Context) (TokenInfo, error) {
	a, err := t.attached(ctx)
	if err != nil {
		return TokenInfo{}, err
	}
	return tokenInfo(a.slot, a.info), nil
}

func tokenInfo(slot uint, i cryptoki.Token) TokenInfo {
	return TokenInfo{
		Label: i.Label, Manufacturer: i.Manufacturer, Model: i.Model, Serial: i.Serial, Firmware: i.Firmware.String(), Slot: slot, Flags: i.Flags,
	}
}

// logIn logs in, unless somebody of this process has; lost is called before it does. What
// it calls of the module is marked in began, for guard.
func (t *Token) logIn(s cryptoki.Session, slot uint, began *atomic.Int64, lost func()) error {
	mark := func(do func() error) error {
		began.Store(t.now())
		defer began.Store(0)
		return do()
	}
	if mark(func() error { return loggedIn(s) }) == nil {
		return nil
	}
	lost()
	var info cryptoki.Token
	if err := mark(func() (err error) { info, err = t.module.Token(slot); return err }); err != nil {
		return errorf(Unavailable, err, "ask the token how many logins it allows")
	}
	err := t.cfg.Login.Attempt(tokenInfo(slot, info), func(pin []byte) error { return mark(func() error { return s.Login(pin) }) })
	switch {
	case err == nil, errors.Is(err, cryptoki.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)):
		return nil
	case KindOf(err) == Unauthenticated:
		return err
	case stepFor(err) == fixPIN:
		return errorf(Unauthenticated, err, "the token refuses the PIN; it is not tried again until it changes")
	}
	return errorf(Unavailable, err, "log in")
}

// sessions is how many operations are under way at once, and spare how many sessions there
// are beside those and that of the login.
func (t *Token) sessions(info cryptoki.Token, locks bool) (n, spare int) {
	if n = t.cfg.Sessions; n == 0 {
		n = defaultSessions
	}
	spare = spares
	if has := int(info.MaxSessions); has > 1 {
		n = min(n, max(has-1-spares, min(has-spares, 2)))
		spare = min(spare, has-1-n)
	}
	if !locks || n <= 1 { // then the module may be one that must be alone with its thread
		return 1, 0
	}
	return n, spare
}

// watch returns why the attachment is over. It keeps an idle token awake, and finds
// out that it is gone before a caller does.
func (t *Token) watch(ctx context.Context, a *attachment) error {
	tick := time.NewTicker(idleCanary / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			a.breaks(errorf(Unavailable, nil, "the token is closed"))
			return a.cause()
		case <-a.broken:
			return a.cause()
		case <-tick.C:
		}
		a.regains()
		if time.Duration(t.now()-t.last.Load()) >= idleCanary {
			bounded, cancel := context.WithTimeout(ctx, t.cfg.HangAfter)
			_ = t.examine(bounded, a)
			cancel()
			t.last.Store(t.now())
		}
	}
}

// detach waits for the calls under way and leaves the token. It returns false when
// they do not end.
func (t *Token) detach(a *attachment) bool {
	select {
	case <-a.empty:
	case <-t.dead:
		return false
	}
	select {
	case a.login <- struct{}{}: // and never given back
	case <-t.dead:
		return false
	}
	_ = t.call(func() error { return t.module.CloseAllSessions(a.slot) }) // the connection may be lost
	_ = t.call(t.module.Finalize)
	t.guarded.Store(nil)
	return t.Err() == nil
}
