package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/agent"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/identity"
)

// maxExpectations bounds the file of policy test, in bytes.
const maxExpectations = 4 << 20

func newPolicy(a *app) *cobra.Command {
	c := group("policy", "Try out a policy, without an agent", "")
	c.AddCommand(newPolicyTest(a), newPolicyExplain(a))
	return c
}

// question is one request to a policy, as flags and files write it.
type question struct {
	Caller    string            `yaml:"caller"`
	Proof     string            `yaml:"proof"`
	UID       *uint32           `yaml:"uid"`
	GID       *uint32           `yaml:"gid"`
	PID       int32             `yaml:"pid"`
	Operation string            `yaml:"operation"`
	Key       string            `yaml:"key"`
	Context   map[string]string `yaml:"context"`
	Time      string            `yaml:"time"`
}

// request is the question to the policy of cfg.
func (q question) request(cfg *agent.Config) (policy.Request, error) {
	id, err := spiffeid.FromString(q.Caller)
	if err != nil {
		return policy.Request{}, fmt.Errorf("caller %q is not a SPIFFE ID: %w", q.Caller, err)
	}
	r := policy.Request{
		Caller:    identity.Caller{ID: id, Proof: identity.Proof(q.Proof)},
		Operation: policy.Operation(q.Operation), Key: q.Key, Context: q.Context, Time: time.Now(),
		PeerUnknown: q.UID == nil,
	}
	if (q.UID == nil) != (q.GID == nil) {
		return r, errors.New("uid and gid are given together, or neither: a condition may read both")
	}
	if q.UID == nil && q.PID != 0 {
		return r, errors.New("pid is given with uid and gid only: without them nothing is known of the process")
	}
	if q.UID != nil {
		r.Caller.Peer = identity.Peer{UID: *q.UID, GID: *q.GID, PID: q.PID}
	}
	if id.Path() == "" {
		return r, fmt.Errorf("caller %q is a trust domain, which calls nothing; add the path of a workload", q.Caller)
	}
	if q.Proof == "" {
		r.Caller.Proof = identity.ProofX509SVID
	}
	if q.Time != "" {
		if r.Time, err = time.Parse(time.RFC3339, q.Time); err != nil {
			return r, fmt.Errorf("time %q is not like 2026-11-23T09:30:00Z", q.Time)
		}
	}
	switch {
	case !slices.Contains(policy.Operations(), r.Operation):
		return r, fmt.Errorf("operation %q is not known; there are: %v", q.Operation, policy.Operations())
	case r.Operation.Keyless() && q.Key != "":
		return r, fmt.Errorf("operation %q acts on no key; leave the key out", q.Operation)
	case !r.Operation.Keyless() && q.Key == "":
		return r, fmt.Errorf("operation %q acts on a key; name one", q.Operation)
	case !slices.Contains(policy.Proofs(), r.Caller.Proof):
		return r, fmt.Errorf("proof %q is not known; there are: %v", q.Proof, policy.Proofs())
	}
	if q.Key == "" {
		return r, nil
	}
	return r, q.find(&r, cfg.Keys)
}

// find puts the key that is asked for into r, by its present name. The agent
// denies everything on a key that it does not have, whatever policy says.
func (q question) find(r *policy.Request, keys []agent.KeyConfig) error {
	for _, k := range keys {
		if k.Name == q.Key || slices.Contains(k.FormerNames, q.Key) {
			r.Key, r.Labels = k.Name, k.Labels
			return nil
		}
	}
	return fmt.Errorf("the configuration has no key %q, so that everything on it is denied", q.Key)
}

// policyFlags are a question and where to ask it.
type policyFlags struct {
	config   string
	question question
	context  pairs
	uid, gid uint32
}

func (a *app) policyFlags(c *cobra.Command, f *policyFlags) {
	flags := c.Flags()
	flags.StringVar(&f.config, "config", defaultConfigPath, "the configuration whose policy is asked")
	flags.StringVar(&f.question.Caller, "caller", "", "SPIFFE ID of the caller")
	flags.StringVar(&f.question.Proof, "proof", string(identity.ProofX509SVID), "how the caller was proven: x509-svid, jwt-svid, static-peer")
	flags.Uint32Var(&f.uid, "uid", 0, "user of the caller's process; not known without")
	flags.Uint32Var(&f.gid, "gid", 0, "group of the caller's process; not known without")
	flags.Int32Var(&f.question.PID, "pid", 0, "the caller's process; not known without")
	flags.StringVar(&f.question.Operation, "operation", "", "the operation")
	flags.StringVar(&f.question.Key, "key", "", "the key; none for operations on no key")
	flags.StringVar(&f.question.Time, "time", "", "when it is asked, as 2026-11-23T09:30:00Z (default: now)")
	f.context.flag(c, "context", "c", "NAME=VALUE of the encryption context; may be repeated")
	a.outputFlag(c)
}

func (f *policyFlags) ask(c *cobra.Command, cfg *agent.Config) (policy.Request, error) {
	if f.question.Caller == "" || f.question.Operation == "" {
		return policy.Request{}, usagef("--caller and --operation are needed")
	}
	context, err := f.context.parse()
	if err != nil {
		return policy.Request{}, err
	}
	f.question.Context = context
	if c.Flags().Changed("uid") {
		f.question.UID = &f.uid
	}
	if c.Flags().Changed("gid") {
		f.question.GID = &f.gid
	}
	r, err := f.question.request(cfg)
	if err != nil {
		return r, usagef("%v", err)
	}
	return r, nil
}

// policyAnswer is what policy test prints of one question.
type policyAnswer struct {
	Allowed bool `json:"allowed"`
	// Rule is the deciding one; empty with the default deny.
	Rule string `json:"rule"`
	// MaxStale is empty without a bound.
	MaxStale string `json:"max_stale"`
	// Limits of the allowing rules; all of them apply.
	Limits []ruleLimits `json:"limits"`
	// Failed tells of conditions that could not be evaluated.
	Failed []string `json:"failed"`
}

type ruleLimits struct {
	Rule   string `json:"rule"`
	Limits string `json:"limits"`
}

// answerOf asks p and says what it answers.
func answerOf(p *policy.Policy, r policy.Request) policyAnswer {
	d, limits := p.Decide(r), p.Limits()
	answer := policyAnswer{Allowed: d.Allowed, Rule: d.Rule, Limits: []ruleLimits{}, Failed: []string{}}
	for _, rule := range d.Limited {
		answer.Limits = append(answer.Limits, ruleLimits{rule, limits[rule].String()})
	}
	for _, f := range d.Failures {
		answer.Failed = append(answer.Failed, f.String())
	}
	if d.MaxStale != nil {
		answer.MaxStale = d.MaxStale.String()
	}
	return answer
}

func (p policyAnswer) rows(t *table) {
	switch {
	case p.Allowed:
		t.row("allowed", "by rule "+p.Rule)
	case p.Rule != "":
		t.row("denied", "by rule "+p.Rule)
	default:
		t.row("denied", "by default: no rule allows it")
	}
	if p.MaxStale != "" {
		t.row("max_stale", p.MaxStale)
	}
	for _, l := range p.Limits {
		t.row("limits", fmt.Sprintf("%s (per caller, by rule %s)", l.Limits, l.Rule))
	}
	for _, failed := range p.Failed {
		t.row("note", failed)
	}
}

func newPolicyTest(a *app) *cobra.Command {
	f, file := policyFlags{}, ""
	c := &cobra.Command{
		Use: "test", Short: "Could this caller do that, and by which rule?",
		Long: `Asks the policy of a configuration one question, and ends with exit code 0 where
it allows and 3 where it denies. No agent is needed.

With --expect it asks all questions of a file instead and compares the answers,
for CI: exit code 5 where one differs. The file is a list such as

  - caller: spiffe://example.org/ns/shop/sa/orders
    operation: decrypt
    key: orders
    context: { tenant: shop }        # and proof, uid, gid, time where they matter
    expect: allow                    # or deny
    rule: orders-service             # the deciding rule; may be left out`,
		Example: "  kms-agent policy test --caller spiffe://example.org/ns/shop/sa/orders --operation encrypt --key orders\n" +
			"  kms-agent policy test --config config.yaml --expect policy-test.yaml",
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := agent.LoadConfig(f.config)
			if err != nil {
				return err
			}
			if file != "" {
				return a.expectations(c, cfg, file)
			}
			r, err := f.ask(c, cfg)
			if err != nil {
				return err
			}
			answer := answerOf(cfg.CompiledPolicy(), r)
			if err := a.print(answer, answer.rows); err != nil || answer.Allowed {
				return err
			}
			return &codedError{code: exitDenied, err: errors.New("denied"), hint: "kms-agent policy explain tells why, rule by rule"}
		},
	}
	a.policyFlags(c, &f)
	c.Flags().StringVar(&file, "expect", "", "a file of questions with the answers that are expected")
	return c
}

// expectation is a question with the answer that is expected.
type expectation struct {
	Question question `yaml:",inline"`
	Expect   string   `yaml:"expect"`
	Rule     string   `yaml:"rule"`
}

// expectationResults is what policy test --expect prints.
type expectationResults struct {
	Passed int      `json:"passed"`
	Failed []string `json:"failed"`
}

func (a *app) expectations(c *cobra.Command, cfg *agent.Config, path string) error {
	data, err := a.readInput(c.Context(), path, maxExpectations, path)
	if err != nil {
		return err
	}
	list, lines, err := parseExpectations(data)
	if err != nil {
		return &codedError{code: exitInvalid, err: fmt.Errorf("%s: %w", path, err), hint: "kms-agent policy test --help shows such a file"}
	}
	results := expectationResults{Failed: []string{}}
	for i, e := range list {
		if fault := e.check(cfg); fault != "" {
			results.Failed = append(results.Failed, fmt.Sprintf("%s:%d: %s", path, lines[i], fault))
			continue
		}
		results.Passed++
	}
	err = a.print(results, func(t *table) {
		for _, fault := range results.Failed {
			t.row(fault)
		}
		t.row(fmt.Sprintf("%d of %d as expected", results.Passed, len(list)))
	})
	if err == nil && len(results.Failed) > 0 {
		err = &codedError{code: exitInvalid, err: fmt.Errorf("%d answers are not as expected", len(results.Failed))}
	}
	return err
}

// parseExpectations returns the expectations and the line of each.
func parseExpectations(data []byte) ([]expectation, []int, error) {
	var list []expectation
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(&list); err != nil {
		return nil, nil, errors.New(strings.TrimSpace(yaml.FormatError(err, false, false)))
	}
	file, err := parser.ParseBytes(data, 0)
	if err != nil {
		return nil, nil, err
	}
	var lines []int
	if len(file.Docs) > 0 {
		if sequence, ok := file.Docs[0].Body.(*ast.SequenceNode); ok {
			for _, node := range sequence.Values {
				lines = append(lines, node.GetToken().Position.Line)
			}
		}
	}
	if len(list) == 0 || len(lines) != len(list) {
		return nil, nil, errors.New("is no list of expectations")
	}
	return list, lines, nil
}

// check returns what is not as expected.
func (e expectation) check(cfg *agent.Config) string {
	if e.Expect != policy.Allow && e.Expect != policy.Deny {
		return fmt.Sprintf("expect is %q; write allow or deny", e.Expect)
	}
	r, err := e.Question.request(cfg)
	if err != nil {
		return err.Error()
	}
	got := answerOf(cfg.CompiledPolicy(), r)
	t := &table{}
	got.rows(t)
	said := strings.Join(t.rows[0], " ")
	if got.Allowed != (e.Expect == policy.Allow) || e.Rule != "" && e.Rule != got.Rule {
		wanted := e.Expect
		if e.Rule != "" {
			wanted += " by rule " + e.Rule
		}
		return fmt.Sprintf("%s may %s %s: expected %s, but it is %s", e.Question.Caller, e.Question.Operation, e.Question.Key, wanted, said)
	}
	return ""
}

// explanation is what policy explain prints.
type explanation struct {
	policyAnswer
	Rules []ruleFinding `json:"rules"`
}

type ruleFinding struct {
	Rule    string `json:"rule"`
	Effect  string `json:"effect"`
	Matches bool   `json:"matches"`
	Why     string `json:"why"`
	// Limits are the rule's own; empty for none.
	Limits string `json:"limits"`
}

func newPolicyExplain(a *app) *cobra.Command {
	f := policyFlags{}
	c := &cobra.Command{
		Use: "explain", Short: "Which rules match a request, and why the others do not",
		Long: `Asks the policy of a configuration one question, as policy test does, and tells of
every rule whether it matches and which of its parts does not.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := agent.LoadConfig(f.config)
			if err != nil {
				return err
			}
			r, err := f.ask(c, cfg)
			if err != nil {
				return err
			}
			all := explanation{policyAnswer: answerOf(cfg.CompiledPolicy(), r), Rules: []ruleFinding{}}
			for _, finding := range cfg.CompiledPolicy().Explain(r) {
				all.Rules = append(all.Rules, ruleFinding{finding.Rule, finding.Effect, finding.Matches, finding.Why, finding.Limits.String()})
			}
			return a.print(all, all.table)
		},
	}
	a.policyFlags(c, &f)
	return c
}

func (e explanation) table(t *table) {
	t.header("RULE", "EFFECT", "MATCHES", "WHY NOT")
	for _, r := range e.Rules {
		t.row(r.Rule, r.Effect, yesNo(r.Matches), orDash(r.Why))
	}
	t.row()
	e.rows(t)
}
