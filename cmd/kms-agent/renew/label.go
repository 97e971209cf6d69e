package renew

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/kms-agent/kms-agent/envelope"
)

// Wrapping is one wrapping key that opens a message.
type Wrapping struct {
	URI     string `json:"uri"`
	Version string `json:"version"`
}

// Label says under what a message is: its logical key and the wrapping keys that
// open it. Two labels are equal when that is the same.
type Label struct {
	Key string
	// wrapped has a line for each wrapping key, sorted: URI, tab, version. The
	// format allows no control characters in either.
	wrapped string
}

// NewLabel makes the label of a message.
func NewLabel(key string, wrappings ...Wrapping) Label {
	lines := make([]string, len(wrappings))
	for i, w := range wrappings {
		lines[i] = w.URI + "\t" + w.Version
	}
	slices.Sort(lines)
	return Label{key, strings.Join(slices.Compact(lines), "\n")}
}

// Wrappings lists the wrapping keys, sorted by URI.
func (l Label) Wrappings() []Wrapping {
	var all []Wrapping
	for line := range strings.Lines(l.wrapped) {
		uri, version, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		all = append(all, Wrapping{uri, version})
	}
	return all
}

// String is for people: orders (local:orders version 2).
func (l Label) String() string {
	var all []string
	for _, w := range l.Wrappings() {
		all = append(all, w.URI+" version "+w.Version)
	}
	return l.Key + " (" + strings.Join(all, ", ") + ")"
}

// heading is what a file's header says. Nothing of it is proven.
type heading struct {
	label   Label
	context map[string]string
	id      [envelope.MessageIDSize]byte
}

var (
	// errForeign is a file that is no message of ours.
	errForeign = errors.New("not a message of a kms-agent")
	errDamaged = errors.New("it begins like a message and its header cannot be read")
)

// magic is how every message begins: its version and suite.
const magic = "\x02\x04\x78"

// readHeading reads the header of a message from r. It fails with errForeign,
// errDamaged, or the error of r.
func readHeading(r io.Reader) (heading, error) {
	begin := make([]byte, len(magic))
	switch _, err := io.ReadFull(r, begin); {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return heading{}, errForeign
	case err != nil:
		return heading{}, err
	case string(begin) != magic:
		return heading{}, errForeign
	}
	message, err := envelope.NewReader(io.MultiReader(bytes.NewReader(begin), r))
	switch {
	case errors.Is(err, envelope.ErrMalformed), errors.Is(err, envelope.ErrLimit):
		return heading{}, fmt.Errorf("%w: %w", errDamaged, err)
	case err != nil:
		return heading{}, err
	}
	return headingOf(message.Header())
}

func headingOf(h *envelope.Header) (heading, error) {
	key := ""
	var wrappings []Wrapping
	for _, edk := range h.EDKs {
		if edk.ProviderID != envelope.ProviderID {
			continue
		}
		info, err := envelope.ParseProviderInfo(edk.ProviderInfo)
		if err != nil {
			return heading{}, fmt.Errorf("%w: %w", errDamaged, err)
		}
		if key == "" {
			key = info.Key
		}
		wrappings = append(wrappings, Wrapping{info.URI, info.Version})
	}
	if key == "" {
		return heading{}, errForeign
	}
	return heading{NewLabel(key, wrappings...), h.Context, h.MessageID}, nil
}

// sameContext tells whether two contexts are equal; none is an empty one.
func sameContext(a, b map[string]string) bool { return maps.Equal(a, b) }

// older tells whether a wrapping key of the label has a version below limit.
func (l Label) older(limit uint64) (bool, error) {
	for _, w := range l.Wrappings() {
		version, err := strconv.ParseUint(w.Version, 10, 64)
		if err != nil {
			return false, fail(ReasonVersion, fmt.Errorf("version %q of %s is no number to compare", w.Version, w.URI))
		}
		if version < limit {
			return true, nil
		}
	}
	return false, nil
}
