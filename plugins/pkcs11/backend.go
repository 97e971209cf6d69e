package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/plugins"
)

const (
	backendName    = "pkcs11"
	backendVersion = "1"
	// maxNames bounds what is remembered of the URIs in messages.
	maxNames = 10000
	// givePatience bounds how long the end of a process whose module hangs waits.
	givePatience = time.Second
)

// backend implements plugins.Backend and plugins.RandomSource over one token.
type backend struct {
	token *hsm.Token
	wraps *hsm.Counter
	log   io.Writer
	exit  func(int)

	mu    sync.Mutex
	names map[string]string // the key's name by its URI; mu guards it and what follows
	of    hsm.TokenInfo     // the token that the URIs were compared with
	worn  map[hsm.ID]bool   // versions of which was told that they have made all their wraps
}

func newBackend() *backend {
	return &backend{log: os.Stderr, exit: os.Exit, names: map[string]string{}, worn: map[hsm.ID]bool{}}
}

// Open takes the settings that docs/hsm.md describes.
func (b *backend) Open(ctx context.Context, raw json.RawMessage) (plugins.Info, error) {
	s, token, err := parseSettings(raw)
	if err != nil {
		return plugins.Info{}, plugins.Errorf(plugins.Invalid, "%w", err)
	}
	if b.token, b.wraps, err = s.open(ctx, token, b.log); err != nil {
		return plugins.Info{}, plugins.Errorf(plugins.Invalid, "%w", explained(err))
	}
	go func() {
		<-b.token.Dead()
		logLine(b.log, "error", "the module hangs; the process ends", map[string]any{"error": b.token.Err().Error()})
		if err := giveBack(b.wraps); err != nil {
			logLine(b.log, "warn", "wraps that were not made count as made", map[string]any{"error": err.Error()})
		}
		b.exit(1)
	}()
	return plugins.Info{Name: backendName, Version: backendVersion, FIPS140: plugins.FIPS140Module(), Capabilities: []string{plugins.CapabilityRandom}}, nil
}

// giveBack gives back the wraps that were reserved and not made, where that is done soon:
// a process that is replaced again and again would use up what a version may make.
func giveBack(wraps *hsm.Counter) error {
	done := make(chan error, 1)
	go func() { done <- wraps.Close() }()
	timer := time.NewTimer(givePatience)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return fmt.Errorf("they could not be given back within %v", givePatience)
	}
}

// Wrap wraps under one version of a key on the token.
func (b *backend) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, binding plugins.Binding) ([]byte, error) {
	v, err := b.version(ctx, key)
	if err != nil {
		return nil, classified(err)
	}
	out, err := b.token.Wrap(ctx, v, nil, plaintext, binding.AAD())
	if err != nil && hsm.KindOf(err) == hsm.KeyUnusable {
		b.tellWorn(v)
	}
	return out, classified(err)
}

// tellWorn writes, once for each version, that it has made all its wraps, if it has:
// callers are told no more than that the key cannot be used.
func (b *backend) tellWorn(v *hsm.Version) {
	used, limit, err := b.wraps.Used(v)
	if err != nil || limit == 0 || used < limit {
		return
	}
	b.mu.Lock()
	told := b.worn[v.ID]
	b.worn[v.ID] = true
	b.mu.Unlock()
	if !told {
		logLine(b.log, "error", "this version of a key has made all the wraps that it may make on this host: rotate the key; what it wrapped opens all the same", map[string]any{
			"key": v.Key, "version": v.Number, "wraps": used, "limit": limit, "cure": "kms-agent hsm rotate " + v.Key,
		})
	}
}

// Unwrap opens what Wrap made.
func (b *backend) Unwrap(ctx context.Context, key plugins.KeyRef, ciphertext []byte, binding plugins.Binding) ([]byte, error) {
	v, err := b.version(ctx, key)
	if err != nil {
		return nil, classified(err)
	}
	out, err := b.token.Unwrap(ctx, v, nil, ciphertext, binding.AAD())
	return out, classified(err)
}

// Describe tells the versions of a key.
func (b *backend) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	name, err := b.name(ctx, uri)
	if err != nil {
		return plugins.Description{}, classified(err)
	}
	k, err := b.token.Key(ctx, name)
	if err != nil {
		return plugins.Description{}, classified(makable(err, name))
	}
	d := plugins.Description{Current: number(k.Current)}
	for _, v := range k.Versions {
		d.Versions = append(d.Versions, plugins.KeyVersion{Version: number(v.Number), State: state(v.State), Created: v.Created})
	}
	return d, nil
}

// Check lets the token open a canary, where a key is in use.
func (b *backend) Check(ctx context.Context) (plugins.Health, error) {
	began := time.Now()
	if err := b.token.Check(ctx); err != nil {
		return plugins.Health{}, classified(err)
	}
	return plugins.Health{UpstreamLatency: time.Since(began), Detail: "the token answers"}, nil
}

// Random gives random of the token's own generator. Whether it has one is not known
// before it is asked.
func (b *backend) Random(ctx context.Context, dst []byte) error {
	return classified(b.token.Random(ctx, dst))
}

// Close leaves the token.
func (b *backend) Close() error {
	if b.token == nil {
		return nil
	}
	return errors.Join(b.token.Close(), b.wraps.Close())
}

func (b *backend) version(ctx context.Context, key plugins.KeyRef) (*hsm.Version, error) {
	name, err := b.name(ctx, key.URI)
	if err != nil {
		return nil, err
	}
	n, err := strconv.ParseUint(key.Version, 10, 32)
	if err != nil || number(uint32(n)) != key.Version {
		return nil, &hsm.Error{Kind: hsm.KeyNotFound, Detail: fmt.Sprintf("no version %.40q: versions are numbers", key.Version)}
	}
	v, err := b.token.Version(ctx, name, uint32(n))
	return v, makable(err, name)
}

// makable is err with the key's name in the command that makes it, so that it can be run
// as it stands.
func makable(err error, name string) error {
	if !noSuchKey(err) {
		return err
	}
	return &hsm.Error{Kind: hsm.KeyNotFound, Detail: strings.Replace(told(err), initKey, "kms-agent hsm init-key "+name, 1)}
}

// initKey is how package hsm names the command that makes a key.
const initKey = "'kms-agent hsm init-key'"

// noSuchKey tells whether an error says that the token has no key of a name.
func noSuchKey(err error) bool {
	return hsm.KindOf(err) == hsm.KeyNotFound && strings.Contains(err.Error(), initKey)
}

// name returns the name of the key that a URI means.
func (b *backend) name(ctx context.Context, uri string) (string, error) {
	t, err := b.token.Info(ctx)
	if err != nil {
		return "", err
	}
	t.Flags, t.Firmware = 0, "" // which token it is does not depend on them
	if name, ok := b.known(t, uri); ok {
		return name, nil
	}
	u, err := keyURI(uri)
	if err != nil {
		return "", err
	}
	if !u.MatchesToken(t.Label, t.Manufacturer, t.Model, t.Serial, t.Slot) {
		return "", &hsm.Error{Kind: hsm.KeyNotFound, Detail: fmt.Sprintf("the URI %.200q names another token than this backend's, %q with serial number %s", uri, t.Label, t.Serial)}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.of == t && len(b.names) < maxNames {
		b.names[uri] = u.Object
	}
	return u.Object, nil
}

// known returns what is remembered of a URI, as long as the token is the same: another
// one may take its place, as after a restore.
func (b *backend) known(t hsm.TokenInfo, uri string) (name string, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.of != t {
		b.of = t
		clear(b.names)
	}
	name, ok = b.names[uri]
	return name, ok
}

// keyURI reads the URI of a key: what selects the token, and object=NAME.
func keyURI(uri string) (hsm.URI, error) {
	u, err := hsm.ParseURI(uri)
	if err != nil {
		return u, &hsm.Error{Kind: hsm.KeyNotFound, Detail: "the wrapping key's URI", Err: err}
	}
	if u.Object == "" {
		return u, &hsm.Error{Kind: hsm.KeyNotFound, Detail: fmt.Sprintf("the URI %.200q names no key: it must have object=NAME", uri)}
	}
	if u.ID != nil || u.Type != "" {
		return u, &hsm.Error{Kind: hsm.KeyNotFound, Detail: fmt.Sprintf("the URI %.200q must name the key by object=NAME alone: its versions have IDs of their own", uri)}
	}
	return u, nil
}

func number(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

func state(s hsm.State) plugins.KeyState {
	switch s {
	case hsm.Enabled:
		return plugins.Enabled
	case hsm.Disabled:
		return plugins.Disabled
	default:
		return plugins.Destroyed
	}
}

// classified gives an error of the token its class in the contract.
func classified(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	class := plugins.Internal
	switch hsm.KindOf(err) {
	case hsm.Unavailable:
		class = plugins.Unavailable
	case hsm.Unauthenticated:
		class = plugins.Unauthenticated
	case hsm.KeyUnusable:
		class = plugins.KeyUnusable
	case hsm.KeyNotFound:
		class = plugins.KeyNotFound
	case hsm.BadCiphertext:
		class = plugins.BadCiphertext
	case hsm.Invalid:
		class = plugins.Invalid
	case hsm.Broken:
	}
	return &plugins.Error{Class: class, KeyOnly: hsm.OfVersion(err), Err: explained(&plain{err})}
}

// plain is an error whose text is without the kinds' names: the class stands before it.
type plain struct{ error }

func (p *plain) Error() string { return told(p.error) }
func (p *plain) Unwrap() error { return p.error }

// explained names the cures of what confinement forbids, in few words: the agent shortens
// long errors. dlopen gives text alone, and a library that may not open its tokens says
// anything: SoftHSM says CKR_GENERAL_ERROR.
func explained(err error) error {
	denied := strings.Contains(err.Error(), "ermission denied")
	if !denied && !astray(err) {
		return err
	}
	modes := ""
	if denied {
		modes = "Do mode and owner let the agent's user read it? "
	}
	return fmt.Errorf("%w (a confined plugin reaches what access of its backend names, and writes, as SoftHSM to its tokens, what is under write: name the directory. %s"+
		"If it is named, was it replaced, as by a restore? kms-agent plugin restart BACKEND)", hinted(err, inBackend), modes)
}

// inBackend is where the variables of an agent's plugin are set.
const inBackend = "in env of its backend?"

// hinted adds where a library that is astray may be looking for its tokens; variables
// says where those of its process are set.
func hinted(err error, variables string) error {
	if !astray(err) {
		return err
	}
	return fmt.Errorf("%w (the library looks where its own configuration says, mostly by a variable, as SOFTHSM2_CONF: is it set, %s)", err, variables)
}

// astray tells whether a library does not begin, or shows no token at all.
func astray(err error) bool {
	text := err.Error()
	none := strings.Contains(text, noToken) && !strings.Contains(text, "(serial ")
	return none || strings.Contains(text, "the module shows no token") || strings.Contains(text, "C_Initialize")
}
