package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

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
	// Problem says why the version cannot be used, or not in full, though its state lets it.
	Problem string `json:"problem,omitempty"`
	// Wraps are told by list alone, of versions that may make no more than so many.
	Wraps *wear `json:"wraps,omitempty"`
}

// wear is what a version has made, at most, of the wraps that it may make on this host.
type wear struct {
	Used  uint64 `json:"used"`
	Limit uint64 `json:"limit"`
}

// list returns the keys, what is wrong with their versions on the token, and how many of
// their wraps they have made; nothing is known of these where wraps is nil.
func list(ctx context.Context, t *hsm.Token, wraps *hsm.Counter) ([]keyState, error) {
	keys, err := t.Keys(ctx)
	if err != nil {
		return nil, err
	}
	out := states(keys...)
	for i, k := range keys {
		if err := problems(ctx, t, k, &out[i]); err != nil {
			return nil, err
		}
		for j, v := range k.Versions {
			out[i].Versions[j].Wraps = wearOf(wraps, v)
		}
	}
	return out, nil
}

// problems adds to the state of a key what is wrong with its versions on the token.
func problems(ctx context.Context, t *hsm.Token, k *hsm.Key, state *keyState) error {
	for i, v := range k.Versions {
		err := k.Conflict
		if err == nil {
			err = t.Verify(ctx, v)
		}
		switch {
		case err == nil:
		case ofVersion(ctx, err):
			state.Versions[i].Problem = told(err)
		case !errors.As(err, new(*hsm.Error)):
			return &hsm.Error{Kind: hsm.Unavailable, Detail: fmt.Sprintf("version %d of key %s could not be looked at", v.Number, v.Key), Err: err}
		default:
			return err
		}
	}
	return nil
}

// warnOfStrays says which keys are in no record.
func warnOfStrays(ctx context.Context, t *hsm.Token, diagnostics io.Writer) {
	strays, err := t.Strays(ctx)
	if err != nil {
		_, _ = fmt.Fprintln(diagnostics, "warning: whether there are keys in no record is not known:", told(err))
		return
	}
	const most = 8
	for _, s := range strays[:min(len(strays), most)] {
		_, _ = fmt.Fprintf(diagnostics, "warning: the key %s with the ID %x is in no record: its record was lost (restore it from the HSM's backup, and delete nothing), "+
			"or it is left of a command that was cut off, and was never used, or is being made just now\n", s.Label, s.ID)
	}
	if more := len(strays) - most; more > 0 {
		_, _ = fmt.Fprintf(diagnostics, "warning: so are %d more keys\n", more)
	}
}

// ofVersion tells whether an error says something of the version that was asked for,
// and not of the token or the way to it.
func ofVersion(ctx context.Context, err error) bool {
	known := (*hsm.Error)(nil)
	if ctx.Err() != nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &known) {
		return false
	}
	return known.Kind != hsm.Unavailable && known.Kind != hsm.Unauthenticated || hsm.OfVersion(err)
}

func wearOf(wraps *hsm.Counter, v *hsm.Version) *wear {
	if wraps == nil || v.State == hsm.Destroyed {
		return nil
	}
	used, limit, err := wraps.Used(v)
	if err != nil || limit == 0 {
		return nil
	}
	return &wear{Used: used, Limit: limit}
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

// maxNamed is how many keys an error names.
const maxNamed = 10

// misnamed has the keys that there are in an error that says that one is not there: its
// name may be a slip, and making it is no cure then.
func (r request) misnamed(ctx context.Context, t *hsm.Token, err error) error {
	if !noSuchKey(err) {
		return err
	}
	keys, failed := t.Keys(ctx)
	if failed != nil || len(keys) == 0 && r.Command == "rotate" {
		return err
	}
	detail := fmt.Sprintf("the token has no key %s, nor any other of kms-agent: is it the right token?", r.Key)
	if len(keys) > 0 {
		detail = fmt.Sprintf("the token has no key %s; its keys are %s", r.Key, named(keys))
	}
	if r.Command == "rotate" {
		detail += "; a new one is made with " + initKey
	}
	return &hsm.Error{Kind: hsm.KeyNotFound, Detail: detail}
}

// named are the names of keys, of many the first.
func named(keys []*hsm.Key) string {
	var names []string
	for _, k := range keys[:min(len(keys), maxNamed)] {
		names = append(names, k.Name)
	}
	text := strings.Join(names, ", ")
	if more := len(keys) - len(names); more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}
