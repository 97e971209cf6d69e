package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/plugins"
)

// adminTimeout bounds one request: HSMs take seconds to make RSA keys.
const adminTimeout = 2 * time.Minute

const (
	// adminPatience is how long a request waits for a token that is not there.
	adminPatience = 5 * time.Second
	// loadLimit is how long loading the library may take where hang_after says nothing.
	loadLimit = 10 * time.Second
)

// request is what `kms-agent hsm` writes to standard input of `administer`.
type request struct {
	Settings json.RawMessage `json:"settings"`
	Command  string          `json:"command"`
	Key      string          `json:"key,omitempty"`
	Version  uint32          `json:"version,omitempty"`
	Suite    string          `json:"suite,omitempty"`
	// Retry lets a PIN be tried that the token has refused before.
	Retry bool `json:"retry_pin,omitempty"`
	// ByFlags: no configuration has the settings, and the process has the environment
	// of the command.
	ByFlags bool `json:"by_flags,omitempty"`
	// Confirmed lets the current version be disabled.
	Confirmed bool `json:"confirmed,omitempty"`
	// WrappingKeys are the keys' URIs, for check.
	WrappingKeys []string `json:"wrapping_keys,omitempty"`
}

// answer is one JSON object on standard output.
type answer struct {
	Error string     `json:"error,omitempty"`
	Class string     `json:"class,omitempty"` // the error's hsm.Kind, or unconfirmed
	Probe *probe     `json:"probe,omitempty"`
	Keys  []keyState `json:"keys,omitempty"`
	// Faults are what check found.
	Faults []fault `json:"faults,omitempty"`
}

// administerOnce is the main function of `administer`. It returns the exit code.
func administerOnce(args []string) int {
	err := plugins.Harden()
	if err == nil {
		var out *os.File
		if out, err = privateOutput(); err == nil {
			return administer(args, os.Stdin, out, os.Stderr)
		}
	}
	_, _ = fmt.Fprintln(os.Stderr, err)
	return 1
}

// privateOutput returns the standard output and gives the vendor's library, which may
// print, the standard error instead.
func privateOutput() (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(unix.Stdout), unix.F_DUPFD_CLOEXEC, unix.Stderr+1)
	if err != nil {
		return nil, fmt.Errorf("keep the standard output for the answer: %w", err)
	}
	if err := unix.Dup3(unix.Stderr, unix.Stdout, 0); err != nil {
		return nil, fmt.Errorf("keep the standard output for the answer: %w", err)
	}
	return os.NewFile(uintptr(fd), "answer"), nil
}

// administer serves one request of `kms-agent hsm`. It returns the exit code.
func administer(args []string, in io.Reader, out, diagnostics io.Writer) int {
	if len(args) != 1 || args[0] != "administer" {
		_, _ = fmt.Fprintln(diagnostics, "this program is a plugin of kms-agent: use 'kms-agent hsm' to administer keys on a token")
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	var r request
	a, err := answer{}, json.NewDecoder(io.LimitReader(in, 1<<20)).Decode(&r)
	switch {
	case err != nil:
	case r.Command == "check":
		a.Faults = r.check()
	default:
		a, err = r.serve(ctx, diagnostics)
	}
	if err != nil {
		a.Error, a.Class = told(hinted(err, r.variables())), classOf(err)
	}
	if err := json.NewEncoder(out).Encode(a); err != nil || a.Error != "" {
		return 1
	}
	return 0
}

// reads tells whether a command changes nothing on the token.
func (r request) reads() bool { return r.Command == "probe" || r.Command == "list" }

// variables says where those of the library's process are set.
func (r request) variables() string {
	if r.ByFlags {
		return "in the environment of this command? As by export SOFTHSM2_CONF=PATH; sudo does not hand it on by itself"
	}
	return inBackend
}

// unconfirmed is what must be confirmed and was not.
type unconfirmed struct{ text string }

func (u *unconfirmed) Error() string { return u.text }

// classOf is what the exit code of `kms-agent hsm` is made of.
func classOf(err error) string {
	switch {
	case errors.As(err, new(*unconfirmed)):
		return "unconfirmed"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return hsm.Unavailable.String()
	}
	return hsm.KindOf(err).String()
}

func (r request) serve(ctx context.Context, diagnostics io.Writer) (answer, error) {
	s, uri, err := parseSettings(r.Settings)
	if err != nil {
		return answer{}, &hsm.Error{Kind: hsm.Invalid, Err: err}
	}
	s.retryPIN = r.Retry
	if !r.reads() {
		unlock, err := s.alone(ctx, diagnostics)
		if err != nil {
			return answer{}, err
		}
		defer unlock()
	}
	waiting, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	pin, err := s.pin(ctx)
	if err != nil {
		return answer{}, &hsm.Error{Kind: hsm.Unauthenticated, Err: err}
	}
	wraps, err := s.counter(r.Command, diagnostics)
	if err != nil {
		return answer{}, &hsm.Error{Kind: hsm.Invalid, Err: err}
	}
	said := ""
	t, err := s.load(ctx, uri, pin, wraps, func(e hsm.Event) {
		switch {
		case e.Attached || e.Err == nil:
		case hopeless(e.Err):
			giveUp(e.Err)
		case hsm.KindOf(e.Err) != hsm.Unauthenticated && said != told(e.Err):
			said = told(e.Err)
			_, _ = fmt.Fprintln(diagnostics, "waiting for the token:", said)
		}
	})
	if err != nil {
		return answer{}, err
	}
	defer func() {
		_ = t.Close()
		if wraps != nil {
			_ = wraps.Close()
		}
	}()
	if _, err := t.Info(waiting); err != nil {
		return answer{}, err
	}
	// What began is brought to its end: a change that is cut off leaves half of it on
	// the token. Each call of the module is bounded by hang_after.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), adminTimeout)
	defer cancel()
	if r.reads() {
		bounded = ctx
	}
	hung, end := context.WithCancelCause(bounded)
	defer end(nil)
	go func() {
		select {
		case <-t.Dead():
			end(t.Err())
		case <-hung.Done():
		}
	}()
	a, err := r.perform(hung, t, wraps, diagnostics)
	if err != nil && t.Err() != nil {
		err = t.Err()
	}
	return a, err
}

// alone keeps other commands of this host from changing keys meanwhile: there are modules
// in which each process sees late what the others do.
func (s settings) alone(ctx context.Context, diagnostics io.Writer) (unlock func(), err error) {
	dir, err := s.stateDirectory()
	if err != nil {
		return nil, &hsm.Error{Kind: hsm.Invalid, Err: err}
	}
	path := filepath.Join(dir, "administer.lock")
	unlock, err = hsm.Exclusive(ctx, path, func() {
		_, _ = fmt.Fprintf(diagnostics, "waiting for another kms-agent hsm that changes keys (%s)\n", path)
	})
	switch {
	case errors.Is(err, hsm.ErrHeld):
		return nil, &hsm.Error{Kind: hsm.Unavailable, Detail: fmt.Sprintf("another kms-agent hsm changes keys (%s)", path), Err: err}
	case err != nil:
		return nil, &hsm.Error{Kind: hsm.Invalid, Detail: "commands that change keys wait for each other by a file that this user must be able to write", Err: err}
	}
	return unlock, nil
}

// counter opens the counts of wraps. Damaged ones are no reason not to make new keys and
// versions, which is their cure: the wraps of these alone are not counted then.
func (s settings) counter(command string, diagnostics io.Writer) (*hsm.Counter, error) {
	dir, err := s.stateDirectory()
	if err != nil {
		return nil, err
	}
	c, damage := s.openCounter(dir, nil)
	if damage != nil {
		_, _ = fmt.Fprintln(diagnostics, "warning:", damage)
		if command == "init-key" || command == "rotate" {
			return nil, nil //nolint:nilnil // nothing is counted
		}
	}
	return c, nil
}

// load opens the token. A library that does not come back from being loaded is left
// to the end of the process, as it is where nobody waits for it any more.
func (s settings) load(ctx context.Context, uri hsm.URI, pin hsm.PINSource, wraps *hsm.Counter, events func(hsm.Event)) (*hsm.Token, error) {
	type opened struct {
		token *hsm.Token
		err   error
	}
	done := make(chan opened, 1)
	go func() {
		t, err := s.openToken(uri, pin, wraps, events, adminPatience)
		done <- opened{t, err}
	}()
	limit := time.Duration(s.HangAfter)
	if limit == 0 {
		limit = loadLimit
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case o := <-done:
		if o.err != nil {
			return nil, &hsm.Error{Kind: hsm.Invalid, Err: s.unloaded(o.err)}
		}
		return o.token, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-timer.C:
		return nil, &hsm.Error{Kind: hsm.Unavailable, Detail: fmt.Sprintf("the library %s has not come back from being loaded for %v", s.Module, limit)}
	}
}

// hopeless tells whether waiting for the token cannot help: it is another that is
// there, or several.
func hopeless(err error) bool {
	return hsm.KindOf(err) == hsm.Invalid || strings.Contains(err.Error(), noToken)
}

// noToken is what package hsm says where tokens are there, and none that is meant.
const noToken = "no token matches"

// told is an error without the names of the kinds: the operator gets them as exit code,
// the agent as class.
func told(err error) string {
	if e := (*hsm.Error)(nil); errors.As(err, &e) && error(e) == err { //nolint:errorlint // this very link of the chain
		switch {
		case e.Err == nil && e.Detail == "":
			return e.Kind.String()
		case e.Err == nil:
			return e.Detail
		case e.Detail == "":
			return told(e.Err)
		}
		return e.Detail + ": " + told(e.Err)
	}
	text := err.Error()
	for _, cause := range causes(err) {
		text = strings.Replace(text, cause.Error(), told(cause), 1)
	}
	return text
}

// causes are what an error wraps.
func causes(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	if cause := errors.Unwrap(err); cause != nil {
		return []error{cause}
	}
	return nil
}

func (r request) perform(ctx context.Context, t *hsm.Token, wraps *hsm.Counter, diagnostics io.Writer) (answer, error) {
	suite := hsm.Suite(0)
	if r.Suite != "" {
		var err error
		if suite, err = hsm.ParseSuite(r.Suite); err != nil {
			return answer{}, &hsm.Error{Kind: hsm.Invalid, Err: err}
		}
	}
	var k *hsm.Key
	var err error
	switch r.Command {
	case "probe":
		p, err := t.Probe(ctx)
		return answer{Probe: probed(p)}, err
	case "list":
		keys, err := list(ctx, t, wraps)
		if err == nil {
			warnOfStrays(ctx, t, diagnostics)
		}
		return answer{Keys: keys}, err
	case "init-key":
		k, err = t.CreateKey(ctx, r.Key, suite)
	case "rotate":
		k, err = t.Rotate(ctx, r.Key, suite)
	case "enable":
		k, err = t.SetState(ctx, r.Key, r.Version, hsm.Enabled)
	case "disable":
		if err = r.sparesCurrent(ctx, t); err == nil {
			k, err = t.SetState(ctx, r.Key, r.Version, hsm.Disabled)
		}
	case "destroy":
		k, err = t.Destroy(ctx, r.Key, r.Version)
	default:
		return answer{}, errors.New("no such command: agent and plugin are of different releases")
	}
	if err != nil {
		return answer{}, r.misnamed(ctx, t, err)
	}
	if k.Note != "" {
		_, _ = fmt.Fprintln(diagnostics, "warning:", k.Note)
	}
	out := states(k)
	if err := problems(ctx, t, k, &out[0]); err != nil { // the change is made all the same
		_, _ = fmt.Fprintln(diagnostics, "warning: what may be wrong with the versions is not known:", told(err))
	}
	return answer{Keys: out}, nil
}

// sparesCurrent refuses to disable the version that encryption needs, unless that is
// confirmed.
func (r request) sparesCurrent(ctx context.Context, t *hsm.Token) error {
	k, err := t.Key(ctx, r.Key)
	if err != nil || k.Current != r.Version || r.Confirmed {
		return err
	}
	return &unconfirmed{fmt.Sprintf("version %d of %q is the current one: nothing could be encrypted without it. "+
		"Make another first with kms-agent hsm rotate %s, or repeat this with --confirm %s@%d", r.Version, r.Key, r.Key, r.Key, r.Version)}
}
