package local

import (
	"fmt"
	"strconv"
	"strings"
)

// Scheme begins the URI of every wrapping key of this backend: "local:orders".
const Scheme = "local:"

// MaxNameLength bounds a key name, in bytes.
const MaxNameLength = 128

// CheckName reports whether name can name a key: 1 to MaxNameLength bytes of
// a-z, 0-9, '.', '_', '-' and '/', beginning with a letter or digit, without
// empty segments between slashes. The error wraps ErrName.
func CheckName(name string) error {
	if validName(name) {
		return nil
	}
	return fmt.Errorf("%w %.140q: use 1 to %d of a-z, 0-9, '.', '_', '-' and '/', beginning with a letter or digit, without empty segments",
		ErrName, name, MaxNameLength)
}

func validName(name string) bool {
	if name == "" || len(name) > MaxNameLength || strings.IndexByte("._-/", name[0]) >= 0 {
		return false
	}
	for i := range len(name) {
		c := name[i]
		letter := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !letter && strings.IndexByte("._-/", c) < 0 {
			return false
		}
	}
	return !strings.Contains(name, "//") && !strings.HasSuffix(name, "/")
}

// nameOf takes the key name out of a wrapping key's URI.
func nameOf(uri string) (string, error) {
	name, ok := strings.CutPrefix(uri, Scheme)
	if !ok {
		return "", fmt.Errorf("%w: wrapping key URI %.140q: this backend's URIs are %s<name>, such as %sorders", ErrName, uri, Scheme, Scheme)
	}
	return name, CheckName(name)
}

// parseVersion reads a version number as this package writes it: decimal,
// from 1, no sign, no leading zeros. Anything else is no version that exists.
func parseVersion(version string) (int, bool) {
	n, err := strconv.Atoi(version)
	if err != nil || n < 1 || n > MaxVersions || strconv.Itoa(n) != version {
		return 0, false
	}
	return n, true
}
