package policy

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/kms-agent/kms-agent/identity"
)

// MaxNameLength bounds the names of rules and roles, in bytes.
const MaxNameLength = 128

// Fault is one mistake in a configuration.
type Fault struct {
	// Index of the rule in Config.Rules; -1 for a fault in Config.Roles.
	Index int
	// Rule is the rule's name, empty where it has none, or the role's.
	Rule string
	// Field is the path below the rule, such as "callers[1]"; for a role the
	// path below the table of roles, such as "operator[0]".
	Field string
	// Message says what is wrong and what to write instead.
	Message string
}

func (f *Fault) Error() string {
	if f.Index < 0 {
		return fmt.Sprintf("roles.%s: %s", f.Field, f.Message)
	}
	if f.Rule == "" {
		return fmt.Sprintf("policy[%d].%s: %s", f.Index, f.Field, f.Message)
	}
	return fmt.Sprintf("policy[%d].%s (rule %q): %s", f.Index, f.Field, f.Rule, f.Message)
}

// Compile checks and compiles cfg. Every mistake is reported at once: the error
// joins *Fault values, found with Faults.
func Compile(cfg Config) (*Policy, error) {
	c := &compiler{cfg: cfg, bits: make(map[Operation]uint32), roles: make(map[string]uint32)}
	for i, o := range Operations() {
		c.bits[o] = 1 << i
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Roles)) {
		c.role(name, cfg.Roles[name])
	}
	seen := make(map[string]int)
	parsed := make([]parsedRule, 0, len(cfg.Rules))
	for i := range cfg.Rules {
		parsed = append(parsed, c.rule(i, seen))
	}
	if len(c.faults) > 0 {
		return nil, errors.Join(c.faults...)
	}
	return build(c.bits, parsed), nil
}

// Faults returns the faults of an error of Compile, in the order of the
// configuration: roles first, by name, then rules.
func Faults(err error) []*Fault {
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) {
		return nil
	}
	var faults []*Fault
	for _, e := range joined.Unwrap() {
		var f *Fault
		if errors.As(e, &f) {
			faults = append(faults, f)
		}
	}
	return faults
}

// parsedRule is a rule without its text.
type parsedRule struct {
	rule
	callers, keys []pattern
}

type compiler struct {
	cfg    Config
	bits   map[Operation]uint32
	roles  map[string]uint32
	faults []error
	// conditions is nil until a rule has one.
	conditions *conditionCompiler
}

// reporter adds faults of one rule or role.
type reporter func(field, format string, a ...any)

func (c *compiler) reporter(index int, name string) reporter {
	return func(field, format string, a ...any) {
		c.faults = append(c.faults, &Fault{Index: index, Rule: name, Field: field, Message: fmt.Sprintf(format, a...)})
	}
}

func (c *compiler) role(name string, operations []Operation) {
	report := c.reporter(-1, name)
	if fault := nameFault(name); fault != "" {
		report(name, "the role's name %s", fault)
	}
	if _, taken := c.bits[Operation(name)]; taken || name == "*" {
		report(name, "a role cannot be called %q, which is an operation already; choose another name", name)
	}
	if len(operations) == 0 {
		report(name, "the role holds no operation; list some of: %s", c.operationNames())
	}
	var mask uint32
	for i, o := range operations {
		bit, known := c.bits[o]
		if !known {
			report(fmt.Sprintf("%s[%d]", name, i), "unknown operation %q; a role holds some of: %s", o, c.operationNames())
		}
		mask |= bit
	}
	c.roles[name] = mask
}

func (c *compiler) rule(index int, seen map[string]int) parsedRule {
	r := &c.cfg.Rules[index]
	report := c.reporter(index, r.Name)
	p := parsedRule{rule: rule{name: r.Name, deny: r.Effect == Deny}}
	if fault := nameFault(r.Name); fault != "" {
		report("name", "the rule's name %s; it is what audit records say", fault)
	} else if first, twice := seen[r.Name]; twice {
		report("name", "the rule policy[%d] is called %q too; give each rule a name of its own", first, r.Name)
	} else {
		seen[r.Name] = index
	}
	if r.Effect != "" && r.Effect != Allow && r.Effect != Deny {
		report("effect", "unknown effect %q; write %q or %q, or leave it out for %q", r.Effect, Allow, Deny, Allow)
	}
	p.callers = c.callers(r, p.deny, report)
	p.ops = c.operations(r, p.deny, report)
	p.keys = keys(r, p.ops, report)
	p.proofs = proofs(r, report)
	p.maxStale = maxStale(r, report)
	p.when = c.when(r, report)
	if p.limits = limits(r, report); p.limits != nil {
		p.limited = []string{p.name}
	}
	return p
}

func (c *compiler) callers(r *Rule, deny bool, report reporter) []pattern {
	if len(r.Callers) == 0 {
		report("callers", "no caller is named; list SPIFFE IDs, or \"*\"")
	}
	var patterns []pattern
	for i, text := range r.Callers {
		p, err := parseCaller(text)
		if err != nil {
			report(fmt.Sprintf("callers[%d]", i), "%v", err)
			continue
		}
		if p.everything() && !deny {
			if c.cfg.TrustDomain.IsZero() {
				report(fmt.Sprintf("callers[%d]", i), "\"*\" means the own trust domain, and none is configured; configure one or name the callers")
				continue
			}
			p = pattern{path: c.cfg.TrustDomain.Name(), below: true}
		}
		patterns = append(patterns, p)
	}
	return patterns
}

func (c *compiler) operations(r *Rule, deny bool, report reporter) uint32 {
	if len(r.Operations) == 0 {
		report("operations", "no operation is named; list %s", c.alternatives())
	}
	var mask uint32
	for i, text := range r.Operations {
		field := fmt.Sprintf("operations[%d]", i)
		bit, known := c.bits[Operation(text)]
		if !known {
			bit, known = c.roles[text]
		}
		switch {
		case text == "*" && deny:
			mask = ^uint32(0)
			continue
		case text == "*":
			report(field, "\"*\" stands only in a deny: an allow lists what it gives; list %s", c.alternatives())
		case !known:
			report(field, "unknown operation or role %q; list %s", text, c.alternatives())
		case bit&c.keyless() != 0 && len(r.Keys) > 0 && !slices.Contains(r.Keys, "*"):
			report(field, "%s acts on no key, so that this rule would never give or take it; "+
				"move it to a rule without keys, or with keys: [\"*\"]", c.keylessIn(text, bit))
		}
		mask |= bit
	}
	return mask
}

// keylessIn names the operations on no key in an operation or role.
func (c *compiler) keylessIn(text string, mask uint32) string {
	var names []string
	for _, o := range Operations() {
		if o.Keyless() && mask&c.bits[o] != 0 {
			names = append(names, strconv.Quote(string(o)))
		}
	}
	name := strings.Join(names, ", ")
	if _, role := c.roles[text]; role {
		return fmt.Sprintf("%s of the role %q", name, text)
	}
	return name
}

// keyless is the mask of the operations that act on no key.
func (c *compiler) keyless() uint32 {
	var mask uint32
	for o, bit := range c.bits {
		if o.Keyless() {
			mask |= bit
		}
	}
	return mask
}

func (c *compiler) operationNames() string {
	return joined(Operations())
}

func (c *compiler) alternatives() string {
	if len(c.roles) == 0 {
		return "some of: " + c.operationNames()
	}
	return fmt.Sprintf("some of: %s; or of the roles: %s", c.operationNames(),
		strings.Join(slices.Sorted(maps.Keys(c.roles)), ", "))
}

func keys(r *Rule, ops uint32, report reporter) []pattern {
	if len(r.Keys) == 0 && !onlyKeyless(ops) {
		report("keys", "no key is named; list key names, or \"*\" for every key")
	}
	var patterns []pattern
	for i, text := range r.Keys {
		p, err := parseKey(text)
		if err != nil {
			report(fmt.Sprintf("keys[%d]", i), "%v", err)
			continue
		}
		patterns = append(patterns, p)
	}
	return patterns
}

// onlyKeyless reports whether no operation of the mask acts on a key.
func onlyKeyless(ops uint32) bool {
	for i, o := range Operations() {
		if ops&(1<<i) != 0 && !o.Keyless() {
			return false
		}
	}
	return true
}

func proofs(r *Rule, report reporter) uint8 {
	if r.Proof == nil {
		return ^uint8(0)
	}
	if len(r.Proof) == 0 {
		report("proof", "no proof is named; list some of: %s, or leave proof out for any", joined(Proofs()))
	}
	var mask uint8
	for i, p := range r.Proof {
		bit := proofBit(p)
		if bit == 0 {
			report(fmt.Sprintf("proof[%d]", i), "unknown proof %q; list some of: %s, or leave proof out for any", p, joined(Proofs()))
		}
		mask |= bit
	}
	return mask
}

// when compiles the rule's condition, if it has one.
func (c *compiler) when(r *Rule, report reporter) *condition {
	if r.When == "" {
		return nil
	}
	if c.conditions == nil {
		var err error
		if c.conditions, err = newConditionCompiler(); err != nil {
			report("when", "%v", err)
			return nil
		}
	}
	compiled, err := c.conditions.compile(string(r.When))
	if err != nil {
		report("when", "%v", err)
	}
	return compiled
}

// maxStale copies the rule's bound, which is the configuration's.
func maxStale(r *Rule, report reporter) *time.Duration {
	switch {
	case r.MaxStale == nil:
		return nil
	case r.Effect == Deny:
		report("max_stale", "a deny has no max_stale: it allows nothing that could be stale; remove it")
	case *r.MaxStale < 0:
		report("max_stale", "%v is negative; write 0 for a confirmation per request, or leave it out for no bound", *r.MaxStale)
	}
	bound := *r.MaxStale
	return &bound
}

func nameFault(name string) string {
	unprintable := func(r rune) bool { return !unicode.IsPrint(r) }
	switch {
	case name == "":
		return "is missing"
	case len(name) > MaxNameLength:
		return fmt.Sprintf("is longer than %d bytes", MaxNameLength)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unprintable):
		return "holds bytes that cannot be printed"
	case strings.TrimSpace(name) != name:
		return "begins or ends with a space"
	}
	return ""
}

// Proofs returns every proof there is, strongest first.
func Proofs() []identity.Proof {
	return []identity.Proof{
		identity.ProofX509SVID, identity.ProofJWTSVID,
		identity.ProofAttestedPeer, identity.ProofStaticPeer,
	}
}

// proofBit is 0 for a proof that nobody knows, so that it matches no rule.
func proofBit(p identity.Proof) uint8 {
	switch p {
	case identity.ProofX509SVID:
		return 1
	case identity.ProofJWTSVID:
		return 2
	case identity.ProofAttestedPeer:
		return 4
	case identity.ProofStaticPeer:
		return 8
	}
	return 0
}

func joined[S ~string](values []S) string {
	texts := make([]string, len(values))
	for i, v := range values {
		texts[i] = string(v)
	}
	return strings.Join(texts, ", ")
}

// build sorts the rules so that a lower index decides: denials first, then by name.
func build(bits map[Operation]uint32, parsed []parsedRule) *Policy {
	slices.SortFunc(parsed, func(a, b parsedRule) int {
		if a.deny != b.deny {
			if a.deny {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.name, b.name)
	})
	p := &Policy{bits: bits, rules: make([]rule, len(parsed))}
	for i, r := range parsed {
		p.rules[i] = r.rule
		everyKey := len(r.keys) == 0
		for _, c := range disjoint(r.callers) {
			p.callers.add(c, i)
		}
		for _, k := range disjoint(r.keys) {
			p.keys.add(k, i)
			everyKey = everyKey || k.everything()
		}
		if everyKey {
			p.keyless.add(i)
		}
	}
	p.callers.finish(len(parsed))
	p.keys.finish(len(parsed))
	p.keyless.finish(len(parsed))
	return p
}
