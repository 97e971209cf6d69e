package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/plugins"
)

// stateDirectory is where counts and the ledger of logins are kept.
func (s settings) stateDirectory() (string, error) {
	dir := s.knownDirectory()
	if dir == "" {
		return "", errors.New("settings.state_dir: no directory for the ledger of logins and the counts of wraps is known; name one")
	}
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("the state directory %q is not an absolute path", dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("the state directory: %w", err)
	}
	return dir, ownDirectory(dir)
}

// knownDirectory is what settings or agent name as the state directory; "" is none.
func (s settings) knownDirectory() string {
	if s.StateDir != "" {
		return s.StateDir
	}
	return os.Getenv(plugins.StateVariable)
}

// ownDirectory refuses a directory in which others could remove the ledger, and so have
// a PIN tried until the token is locked, or the counts of wraps.
func ownDirectory(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("the state directory: %w", err)
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("the state directory %s has mode %04o, so others may change what is in it: chmod 700 it", dir, info.Mode().Perm())
	case !ok || int(owner.Uid) != os.Geteuid():
		return fmt.Errorf("the state directory %s belongs to another user than this one, uid %d", dir, os.Geteuid())
	}
	return nil
}

// open opens the token and the counts of its wraps.
// Damaged ones are told, and keep nobody from unwrapping.
func (s settings) open(ctx context.Context, token hsm.URI, log io.Writer) (*hsm.Token, *hsm.Counter, error) {
	dir, err := s.stateDirectory()
	if err != nil {
		return nil, nil, err
	}
	pin, err := s.pin(ctx)
	if err != nil {
		return nil, nil, err
	}
	counter, damage := s.openCounter(dir, logWorn(log))
	if damage != nil {
		logLine(log, "error", "the counts of wraps are damaged", map[string]any{"error": damage.Error()})
	}
	t, err := s.openToken(token, pin, counter, logEvents(log), 0)
	return t, counter, err
}

// openCounter opens the counts of wraps in a directory. damage says in a line why the file
// cannot be read, with the cure: until then nothing can be counted, nor wrapped where it
// must be, and everything opens.
func (s settings) openCounter(dir string, worn func(v *hsm.Version, used, limit uint64)) (c *hsm.Counter, damage error) {
	c, err := hsm.OpenCounter(dir, s.FleetSize, worn)
	if err != nil {
		damage = errors.New(strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return c, damage
}

// openToken opens the token alone. patience is how long an operation waits for it.
func (s settings) openToken(token hsm.URI, pin hsm.PINSource, wraps *hsm.Counter, events func(hsm.Event), patience time.Duration) (*hsm.Token, error) {
	dir, err := s.stateDirectory()
	if err != nil {
		return nil, err
	}
	var catalogue *hsm.CatalogueFile
	if s.Catalogue != "" {
		catalogue = &hsm.CatalogueFile{Path: s.Catalogue, KeyFile: s.CatalogueKey}
	}
	return hsm.Open(hsm.Config{
		Module: s.Module, Reserved: s.ModuleConfig, Token: token, Catalogue: catalogue, Sessions: s.Sessions,
		Login:     &hsm.Ledger{Path: filepath.Join(dir, "logins.json"), PIN: pin, Retry: s.retryPIN},
		HangAfter: time.Duration(s.HangAfter), Patience: patience, Events: events, Wraps: wraps,
		Stay: true, // the agent gives calls up by itself, and hang_after ends a process whose calls stay for good
	})
}

// logEvents writes what happens to the connection as the agent's log takes it.
func logEvents(w io.Writer) func(hsm.Event) {
	return func(e hsm.Event) {
		if e.Attached {
			logLine(w, "info", "token attached", map[string]any{
				"token": e.Token.Label, "serial": e.Token.Serial, "model": e.Token.Model, "firmware": e.Token.Firmware, "slot": e.Token.Slot,
			})
			return
		}
		fields := map[string]any{}
		if e.Retry > 0 {
			fields["retry"] = e.Retry.Round(time.Millisecond).String()
		}
		if e.Err != nil {
			fields["error"] = explained(&plain{e.Err}).Error()
		}
		logLine(w, "warn", "token is not attached", fields)
	}
}

// logWorn writes that a version should be rotated soon.
func logWorn(w io.Writer) func(v *hsm.Version, used, limit uint64) {
	return func(v *hsm.Version, used, limit uint64) {
		logLine(w, "warn", "half of the wraps that this version of a key may make on this host are made: rotate the key", map[string]any{
			"key": v.Key, "version": v.Number, "wraps": used, "limit": limit,
		})
	}
}

func logLine(w io.Writer, level, message string, fields map[string]any) {
	fields["@level"], fields["@message"] = level, message
	if b, err := json.Marshal(fields); err == nil {
		_, _ = w.Write(append(b, '\n'))
	}
}

func (s settings) pinSource() hsm.PINSource {
	return hsm.PINSource{File: s.PINFile, Credential: s.PINCred, Variable: s.PINVariable}
}

// pinPatience is how long the PIN may take to come through a pipe.
const pinPatience = time.Minute

// pin returns where the PIN is. One that comes through a pipe is here when it returns.
func (s settings) pin(ctx context.Context) (hsm.PINSource, error) {
	source := s.pinSource()
	if s.PINDescr == "" {
		return source, nil
	}
	file, err := plugins.Descriptor(s.PINDescr)
	if err != nil {
		return source, fmt.Errorf("settings.pin_descriptor: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, pinPatience)
	defer cancel()
	source.Descriptor, err = hsm.OpenPINDescriptor(ctx, file)
	return source, err
}
