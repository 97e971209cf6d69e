package policy

import (
	"math/bits"
	"slices"
	"strings"
)

// index finds the rules whose patterns match a path, in time that depends on
// the path and not on the number of rules.
type index struct {
	exact ruleSet // rules for exactly this path
	below ruleSet // rules for every path that goes on from here
	next  map[string]*index
}

func (x *index) add(p pattern, rule int) {
	if p.path != "" {
		for segment := range strings.SplitSeq(p.path, separator) {
			child := x.next[segment]
			if child == nil {
				child = &index{}
				if x.next == nil {
					x.next = make(map[string]*index)
				}
				x.next[segment] = child
			}
			x = child
		}
	}
	if p.below {
		x.below.add(rule)
	} else {
		x.exact.add(rule)
	}
}

func (x *index) finish(rules int) {
	x.exact.finish(rules)
	x.below.finish(rules)
	for _, child := range x.next {
		child.finish(rules)
	}
}

// find appends the sets of the rules that match path to found. A path with an
// empty segment is ambiguous and matches nothing.
func (x *index) find(path string, found []*ruleSet) []*ruleSet {
	if path == "" || path[0] == '/' || path[len(path)-1] == '/' || strings.Contains(path, "//") {
		return nil
	}
	for more := true; more; {
		if len(x.below.list) > 0 {
			found = append(found, &x.below)
		}
		var segment string
		segment, path, more = strings.Cut(path, separator)
		if x = x.next[segment]; x == nil {
			return found
		}
	}
	if len(x.exact.list) > 0 {
		found = append(found, &x.exact)
	}
	return found
}

// ruleSet is a set of rule numbers.
type ruleSet struct {
	list []uint32 // ascending
	bits []uint64 // the same as a bit set; nil where the set is sparse
}

// add takes ascending numbers; the same may come again.
func (s *ruleSet) add(rule int) {
	if n := len(s.list); n == 0 || s.list[n-1] != uint32(rule) {
		s.list = append(s.list, uint32(rule))
	}
}

// finish adds the bit set where it takes no more room than the list.
func (s *ruleSet) finish(rules int) {
	s.list = slices.Clip(s.list)
	words := (rules + 63) / 64
	if len(s.list) < 2*words {
		return
	}
	s.bits = make([]uint64, words)
	for _, r := range s.list {
		s.bits[r/64] |= 1 << (r % 64)
	}
}

func (s *ruleSet) has(rule uint32) bool {
	if s.bits != nil {
		return s.bits[rule/64]&(1<<(rule%64)) != 0
	}
	_, found := slices.BinarySearch(s.list, rule)
	return found
}

// common shows v the rules of both sets, in ascending order, until v has seen enough.
func common(a, b *ruleSet, v *verdict) {
	if a.bits != nil && b.bits != nil {
		for i, word := range a.bits {
			for word &= b.bits[i]; word != 0; word &= word - 1 {
				if !v.visit(uint32(i*64 + bits.TrailingZeros64(word))) {
					return
				}
			}
		}
		return
	}
	if len(b.list) < len(a.list) {
		a, b = b, a
	}
	for _, r := range a.list {
		if b.has(r) && !v.visit(r) {
			return
		}
	}
}
