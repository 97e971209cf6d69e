package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/interpreter"
)

// Bounds of conditions. Costs are in CEL's own units, about one for each step
// of an evaluation.
const (
	// MaxConditionLength bounds the text of a condition, in bytes.
	MaxConditionLength = 4096
	// maxConditionCost bounds an evaluation: what could cost more is not loaded,
	// and what does, on the longest contexts, has failed.
	maxConditionCost = 100_000
)

// Names of what a condition sees.
const (
	varCallerID          = "caller.id"
	varCallerTrustDomain = "caller.trust_domain"
	varCallerPath        = "caller.path"
	varCallerProof       = "caller.proof"
	varCallerUID         = "caller.uid"
	varCallerGID         = "caller.gid"
	varKeyName           = "key.name"
	varKeyLabels         = "key.labels"
	varOperation         = "operation"
	varContext           = "context"
	varTime              = "time"
)

// variables are what a condition sees, in the order of the documentation.
func variables() []struct {
	name string
	kind *cel.Type
} {
	texts := cel.MapType(cel.StringType, cel.StringType)
	return []struct {
		name string
		kind *cel.Type
	}{
		{varCallerID, cel.StringType}, {varCallerTrustDomain, cel.StringType}, {varCallerPath, cel.ListType(cel.StringType)},
		{varCallerProof, cel.StringType}, {varCallerUID, cel.IntType}, {varCallerGID, cel.IntType},
		{varKeyName, cel.StringType}, {varKeyLabels, texts},
		{varOperation, cel.StringType}, {varContext, texts}, {varTime, cel.TimestampType},
	}
}

// conditions compiles what rules say in when.
type conditions struct{ env *cel.Env }

func newConditions() (*conditions, error) {
	options := []cel.EnvOption{
		cel.EagerlyValidateDeclarations(true),
		cel.ASTValidators(cel.ValidateDurationLiterals(), cel.ValidateTimestampLiterals(), cel.ValidateRegexLiterals(),
			cel.ValidateHomogeneousAggregateLiterals(), cel.ValidateComprehensionNestingLimit(2)),
		cel.ParserExpressionSizeLimit(MaxConditionLength),
	}
	for _, v := range variables() {
		options = append(options, cel.Variable(v.name, v.kind))
	}
	env, err := cel.NewEnv(options...)
	if err != nil {
		return nil, fmt.Errorf("conditions: %w", err)
	}
	return &conditions{env}, nil
}

// condition is a compiled one. It is safe for concurrent use.
type condition struct{ program cel.Program }

// compile returns the condition, or what is wrong with its text.
func (c *conditions) compile(text string) (*condition, error) {
	if len(text) > MaxConditionLength {
		return nil, fmt.Errorf("is longer than %d bytes", MaxConditionLength)
	}
	ast, issues := c.env.Compile(text)
	if issues.Err() != nil {
		return nil, explainIssues(issues)
	}
	if !ast.OutputType().IsExactType(cel.BoolType) {
		return nil, fmt.Errorf("is of type %s; it must be true or false, as %q is", ast.OutputType(), "context.tenant == caller.path[1]")
	}
	estimate, err := c.env.EstimateCost(ast, sizes{})
	if err != nil {
		return nil, fmt.Errorf("its cost cannot be estimated: %w", err)
	}
	if estimate.Max > maxConditionCost {
		return nil, fmt.Errorf("may take %d steps to evaluate, and %d are possible: loop over less, or match shorter texts", estimate.Max, maxConditionCost)
	}
	program, err := c.env.Program(ast, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(maxConditionCost))
	if err != nil {
		return nil, err
	}
	return &condition{program}, nil
}

// explainIssues says where in the text the mistakes are, in one line.
func explainIssues(issues *cel.Issues) error {
	var lines []string
	for _, e := range issues.Errors() {
		line := fmt.Sprintf("at %d:%d: %s", e.Location.Line(), e.Location.Column()+1, e.Message)
		if strings.Contains(e.Message, "undeclared reference") || strings.Contains(e.Message, "undefined field") {
			var names []string
			for _, v := range variables() {
				names = append(names, v.name)
			}
			line += " (known: " + strings.Join(names, ", ") + ")"
		}
		lines = append(lines, line)
	}
	return errors.New(strings.Join(slices.Compact(lines), "; "))
}

// sizes tells the estimate how long things are at most: what envelope and
// identity let through.
type sizes struct{}

// EstimateSize implements cost.CostEstimator.
func (sizes) EstimateSize(n cost.AstNode) *cost.SizeEstimate {
	size := func(most uint64) *cost.SizeEstimate { return &cost.SizeEstimate{Min: 0, Max: most} }
	switch path := n.Path(); {
	case len(path) == 0:
		return nil
	case path[0] == varContext && len(path) == 1:
		return size(64)
	case path[0] == varContext:
		return size(1024)
	case path[0] == varKeyLabels && len(path) == 1, path[0] == varCallerPath && len(path) == 1:
		return size(32)
	case path[0] == varCallerID:
		return size(2048)
	default:
		return size(256)
	}
}

// EstimateCallCost implements cost.CostEstimator.
func (sizes) EstimateCallCost(string, string, *cost.AstNode, []cost.AstNode) *cost.CallEstimate {
	return nil
}

// holds evaluates the condition. An error says that it has no value for this
// request; what then counts is the rule's effect.
func (c *condition) holds(r *Request) (bool, error) {
	value, _, err := c.program.Eval(&facts{*r})
	if err != nil {
		return false, err
	}
	truth, ok := value.(types.Bool)
	if !ok {
		return false, fmt.Errorf("its value is of type %s", value.Type().TypeName())
	}
	return bool(truth), nil
}

// facts are a request as conditions see it.
type facts struct{ request Request }

// ResolveName implements interpreter.Activation.
func (f *facts) ResolveName(name string) (any, bool) {
	r := &f.request
	switch name {
	case varCallerID:
		return r.Caller.ID.String(), true
	case varCallerTrustDomain:
		return r.Caller.ID.TrustDomain().Name(), true
	case varCallerPath:
		return strings.Split(strings.TrimPrefix(r.Caller.ID.Path(), separator), separator), true
	case varCallerProof:
		return string(r.Caller.Proof), true
	case varCallerUID:
		return int64(r.Caller.Peer.UID), true
	case varCallerGID:
		return int64(r.Caller.Peer.GID), true
	case varKeyName:
		return r.Key, true
	case varKeyLabels:
		return texts(r.Labels), true
	case varOperation:
		return string(r.Operation), true
	case varContext:
		return texts(r.Context), true
	case varTime:
		return r.Time.UTC(), true
	}
	return nil, false
}

// Parent implements interpreter.Activation.
func (f *facts) Parent() interpreter.Activation { return nil }

func texts(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}
