package policy

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	separator    = "/"
	spiffeScheme = "spiffe://"
)

// pattern matches slash-separated paths: one exactly, or all that lie one
// segment or more below one.
type pattern struct {
	path  string // empty only with below: everything
	below bool
}

func (p pattern) everything() bool { return p.path == "" }

// parseCaller parses a pattern of SPIFFE IDs. The path of the result is the
// SPIFFE ID without its scheme: the trust domain is the first segment.
func parseCaller(text string) (pattern, error) {
	if text == "*" {
		return pattern{below: true}, nil
	}
	exact, below := strings.CutSuffix(text, "/*")
	if strings.Contains(exact, "*") {
		return pattern{}, fmt.Errorf("%q: a \"*\" stands alone, or after a \"/\" at the end; write \"spiffe://trust-domain/path/*\"", text)
	}
	id, err := spiffeid.FromString(exact)
	if err != nil {
		return pattern{}, fmt.Errorf("%q is not a SPIFFE ID (%w); write \"spiffe://trust-domain/path\"", text, err)
	}
	if id.Path() == "" && !below {
		return pattern{}, fmt.Errorf("%q names a trust domain, which calls nothing; write \"%s/*\" for all of its workloads", text, text)
	}
	return pattern{path: callerPath(id), below: below}, nil
}

// callerPath is a SPIFFE ID as the path that patterns match.
func callerPath(id spiffeid.ID) string {
	return strings.TrimPrefix(id.String(), spiffeScheme)
}

// parseKey parses a pattern of logical key names.
func parseKey(text string) (pattern, error) {
	if text == "*" {
		return pattern{below: true}, nil
	}
	path, below := strings.CutSuffix(text, "/*")
	if strings.Contains(path, "*") {
		return pattern{}, fmt.Errorf("%q: a \"*\" stands alone, or after a \"/\" at the end; write \"prefix/*\"", text)
	}
	odd := func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }
	if !utf8.ValidString(path) || strings.ContainsFunc(path, odd) {
		return pattern{}, fmt.Errorf("%q: a key's name holds no spaces or unprintable characters", text)
	}
	for segment := range strings.SplitSeq(path, separator) {
		if segment == "" {
			return pattern{}, fmt.Errorf("%q: a part between two \"/\" is empty; write \"name\", \"prefix/name\" or \"prefix/*\"", text)
		}
	}
	return pattern{path: path, below: below}, nil
}

// disjoint is patterns without those that another one covers: no two of the
// rest match the same path.
func disjoint(patterns []pattern) []pattern {
	all := make(map[pattern]bool, len(patterns))
	for _, p := range patterns {
		all[p] = true
	}
	seen := make(map[pattern]bool, len(patterns))
	var kept []pattern
	for _, p := range patterns {
		if !covered(p, all) && !seen[p] {
			kept = append(kept, p)
		}
		seen[p] = true
	}
	return kept
}

// covered reports whether another pattern of all matches all that p matches.
func covered(p pattern, all map[pattern]bool) bool {
	if p.everything() {
		return false
	}
	above := all[pattern{below: true}]
	for i := range p.path {
		above = above || p.path[i] == '/' && all[pattern{path: p.path[:i], below: true}]
	}
	return above
}
