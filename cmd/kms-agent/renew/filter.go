package renew

import (
	"fmt"
	"path"
	"strings"
)

// Filter says which files are looked at, and which messages are meant. The zero
// Filter takes all.
type Filter struct {
	// Include and Exclude are patterns of path.Match. One without a slash is for
	// the name of a file, and for Exclude also of a directory; one with a slash for
	// the path below the named directory. A file must match one Include, where
	// there are any, and no Exclude.
	Include, Exclude []string
	// Flat leaves out what is in directories below those named.
	Flat bool
	// Key, WrappingKey and OlderThan leave out messages that have another logical
	// key, that the wrapping key of this URI does not open, or of which every
	// wrapping key has this version or a higher one. "" and 0 take all.
	Key, WrappingKey string
	OlderThan        uint64
}

// Check reports patterns that are none.
func (f *Filter) Check() error {
	for _, patterns := range [][]string{f.Include, f.Exclude} {
		for _, pattern := range patterns {
			if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
				return fmt.Errorf("%q is not a pattern of names", pattern)
			}
		}
	}
	return nil
}

func (f *Filter) excludes(below string) bool { return matchesOne(f.Exclude, below) }

func (f *Filter) includes(below string) bool {
	return (len(f.Include) == 0 || matchesOne(f.Include, below)) && !f.excludes(below)
}

func matchesOne(patterns []string, below string) bool {
	for _, pattern := range patterns {
		text := below
		if !strings.Contains(pattern, "/") {
			text = path.Base(below)
		}
		if ok, _ := path.Match(pattern, text); ok { // Check has seen the pattern
			return true
		}
	}
	return false
}

// means tells whether a message with this label is meant.
func (f *Filter) means(l Label) (bool, error) {
	if f.Key != "" && l.Key != f.Key {
		return false, nil
	}
	if f.WrappingKey != "" && !l.opensWith(f.WrappingKey) {
		return false, nil
	}
	if f.OlderThan == 0 {
		return true, nil
	}
	return l.older(f.OlderThan)
}

func (l Label) opensWith(uri string) bool {
	for _, w := range l.Wrappings() {
		if w.URI == uri {
			return true
		}
	}
	return false
}
