package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

// adminTimeout bounds one request: HSMs take seconds to make RSA keys.
const adminTimeout = 2 * time.Minute

// request is what `kms-agent hsm` writes to standard input of `administer`.
type request struct {
	Settings json.RawMessage `json:"settings"`
	Command  string          `json:"command"`
	Key      string          `json:"key,omitempty"`
	Version  uint32          `json:"version,omitempty"`
	Suite    string          `json:"suite,omitempty"`
	// Retry lets a PIN be tried that the token has refused before.
	Retry bool `json:"retry_pin,omitempty"`
}

// answer is one JSON object on standard output.
type answer struct {
	Error string     `json:"error,omitempty"`
	Probe *probe     `json:"probe,omitempty"`
	Keys  []keyState `json:"keys,omitempty"`
}

type probe struct {
	Module       string  `json:"module"`
	Library      string  `json:"library"`
	Manufacturer string  `json:"manufacturer"`
	Cryptoki     string  `json:"cryptoki"`
	Token        string  `json:"token"`
	Model        string  `json:"model"`
	Serial       string  `json:"serial"`
	Firmware     string  `json:"firmware"`
	Slot         uint    `json:"slot"`
	Sessions     int     `json:"sessions"`
	MaxSessions  uint    `json:"max_sessions,omitempty"`
	Mechanisms   int     `json:"mechanisms"`
	Suites       []trial `json:"suites"`
	Use          string  `json:"use,omitempty"`
}

type trial struct {
	Suite  string `json:"suite"`
	Works  bool   `json:"works"`
	IV     string `json:"iv,omitempty"`
	PairUS int64  `json:"pair_us,omitempty"`
	Reason string `json:"reason,omitempty"`
}

type keyState struct {
	Key      string         `json:"key"`
	Current  uint32         `json:"current"`
	Versions []versionState `json:"versions"`
}

type versionState struct {
	Version uint32    `json:"version"`
	State   string    `json:"state"`
	Suite   string    `json:"suite"`
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
}

// administer serves one request of `kms-agent hsm`. It returns the exit code.
func administer(args []string, in io.Reader, out, diagnostics io.Writer) int {
	if len(args) != 1 || args[0] != "administer" {
		_, _ = fmt.Fprintln(diagnostics, "this program is a plugin of kms-agent: use 'kms-agent hsm' to administer keys on a token")
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	var r request
	a, err := answer{}, json.NewDecoder(io.LimitReader(in, 1<<20)).Decode(&r)
	if err == nil {
		a, err = r.serve(ctx, diagnostics)
	}
	if err != nil {
		a.Error = err.Error()
	}
	if err := json.NewEncoder(out).Encode(a); err != nil || a.Error != "" {
		return 1
	}
	return 0
}

func (r request) serve(ctx context.Context, diagnostics io.Writer) (answer, error) {
	s, uri, err := parseSettings(r.Settings)
	if err != nil {
		return answer{}, err
	}
	s.retryPIN = r.Retry
	t, err := s.openToken(uri, logEvents(diagnostics), time.Minute)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = t.Close() }()
	hung, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-t.Dead():
			cancel(t.Err())
		case <-hung.Done():
		}
	}()
	a, err := r.perform(hung, t)
	if err != nil && t.Err() != nil {
		err = t.Err()
	}
	return a, err
}

func (r request) perform(ctx context.Context, t *hsm.Token) (answer, error) {
	suite := hsm.Suite(0)
	if r.Suite != "" {
		var err error
		if suite, err = hsm.ParseSuite(r.Suite); err != nil {
			return answer{}, err
		}
	}
	var k *hsm.Key
	var err error
	switch r.Command {
	case "probe":
		p, err := t.Probe(ctx)
		return answer{Probe: probed(p)}, err
	case "list":
		keys, err := t.Keys(ctx)
		return answer{Keys: states(keys...)}, err
	case "init-key":
		k, err = t.CreateKey(ctx, r.Key, suite)
	case "rotate":
		k, err = t.Rotate(ctx, r.Key, suite)
	case "enable":
		k, err = t.SetState(ctx, r.Key, r.Version, hsm.Enabled)
	case "disable":
		k, err = t.SetState(ctx, r.Key, r.Version, hsm.Disabled)
	case "destroy":
		k, err = t.Destroy(ctx, r.Key, r.Version)
	default:
		return answer{}, errors.New("no such command: agent and plugin are of different releases")
	}
	if err != nil {
		return answer{}, err
	}
	return answer{Keys: states(k)}, nil
}

func probed(p hsm.Probe) *probe {
	out := &probe{
		Module: p.Module, Library: p.Library, Manufacturer: p.Manufacturer, Cryptoki: p.Cryptoki, Token: p.Token.Label,
		Model: p.Token.Model, Serial: p.Token.Serial, Firmware: p.Token.Firmware, Slot: p.Token.Slot, Sessions: p.Sessions,
		MaxSessions: p.MaxSessions, Mechanisms: p.Mechanisms,
	}
	if p.Use != 0 {
		out.Use = p.Use.String()
	}
	for _, s := range p.Trials {
		t := trial{Suite: s.Suite.String(), Works: s.Err == nil, IV: s.IV, PairUS: s.Pair.Microseconds()}
		if s.Err != nil {
			t.Reason = s.Err.Error()
		}
		out.Suites = append(out.Suites, t)
	}
	return out
}

func states(keys ...*hsm.Key) []keyState {
	out := make([]keyState, 0, len(keys))
	for _, k := range keys {
		s := keyState{Key: k.Name, Current: k.Current}
		for _, v := range k.Versions {
			s.Versions = append(s.Versions, versionState{
				Version: v.Number, State: v.State.String(), Suite: v.Suite.String(), ID: fmt.Sprintf("%x", v.ID), Created: v.Created,
			})
		}
		out = append(out, s)
	}
	return out
}
