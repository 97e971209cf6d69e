package policy

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/env"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/interpreter"
)

// Bounds of a condition.
const (
	// MaxConditionLength bounds the text of a condition, in bytes.
	MaxConditionLength = 4096
	// MaxConditionCost bounds what one evaluation may cost, in CEL's units: about
	// one for each step, one for ten bytes of text compared. A condition that
	// could cost more for some request is refused when it is compiled.
	MaxConditionCost = 20_000
	// maxConditionDepth bounds how deeply parentheses and operators nest, and
	// maxConditionNodes how many of them there are.
	maxConditionDepth = 50
	maxConditionNodes = 1000
)

// What a request holds at most, as far as conditions can see: the bounds of an
// encryption context, of a SPIFFE ID and of a key's labels.
const (
	maxContextPairs = 64
	maxContextText  = 16 << 10
	maxPathSegments = 1024
	maxIDText       = 2048
	maxLabels       = 32
	maxLabelText    = 256
)

// condition is a compiled `when`. It is immutable and safe for concurrent use.
type condition struct {
	text    string
	program cel.Program
	ast     *ast.AST
	// open says that it reads what only a request has: context or time.
	open bool
}

// conditionCompiler compiles the conditions of one policy.
type conditionCompiler struct {
	env   *cel.Env
	zones zones
}

// newConditionCompiler makes the language of conditions: CEL's standard library
// without what depends on the order of a map (map, filter), on the host's files
// while it evaluates (time zones by name, replaced by zones), or on regular
// expressions.
func newConditionCompiler() (*conditionCompiler, error) {
	registry, err := types.NewRegistry()
	if err != nil {
		return nil, fmt.Errorf("policy: CEL: %w", err)
	}
	known := zones{}
	e, err := cel.NewCustomEnv(append([]cel.EnvOption{
		cel.CustomTypeAdapter(registry),
		cel.CustomTypeProvider(&provider{Provider: registry, fields: fieldTypes()}),
		cel.StdLib(cel.StdLibSubset(&env.LibrarySubset{
			ExcludeMacros: []string{"map", "filter"}, ExcludeFunctions: excludedFunctions(),
		})),
		cel.Variable("caller", cel.ObjectType(callerType)),
		cel.Variable("key", cel.ObjectType(keyType)),
		cel.Variable("operation", cel.StringType),
		cel.Variable("context", cel.MapType(cel.StringType, cel.StringType)),
		cel.Variable("time", cel.TimestampType),
		cel.ASTValidators(cel.ValidateDurationLiterals(), cel.ValidateTimestampLiterals(), cel.ValidateComprehensionNestingLimit(2)),
		cel.ParserRecursionLimit(maxConditionDepth), cel.ParserExpressionSizeLimit(MaxConditionLength),
		cel.ExpressionNodeLimit(maxConditionNodes), cel.DefaultUTCTimeZone(true),
	}, known.functions()...)...)
	if err != nil {
		return nil, fmt.Errorf("policy: CEL: %w", err)
	}
	return &conditionCompiler{env: e, zones: known}, nil
}

func excludedFunctions() []*env.Function {
	excluded := []*env.Function{{Name: "matches"}, {Name: "dyn"}, {Name: "type"}}
	for name, overload := range zoneFunctions() {
		excluded = append(excluded, &env.Function{Name: name, Overloads: []*env.Overload{{ID: overload}}})
	}
	return excluded
}

// compile compiles one condition. An error says what is wrong, where in the
// text, and what to write instead.
func (c *conditionCompiler) compile(text string) (*condition, error) {
	if strings.TrimSpace(text) == "" {
		return nil, errors.New("the condition is empty; remove it, or write one such as context.tenant == caller.path[1]")
	}
	if len(text) > MaxConditionLength {
		return nil, fmt.Errorf("the condition has %d bytes, %d at most; several rules may each have one", len(text), MaxConditionLength)
	}
	checked, issues := c.env.Compile(text)
	if err := issues.Err(); err != nil {
		return nil, explainIssues(issues)
	}
	if checked.OutputType() != cel.BoolType {
		return nil, fmt.Errorf("the condition gives a %s; it must say true or false, so compare it with something", checked.OutputType())
	}
	if err := c.zones.load(checked.NativeRep()); err != nil {
		return nil, err
	}
	estimate, err := c.env.EstimateCost(checked, sizes{})
	if err != nil {
		return nil, fmt.Errorf("the condition's cost cannot be estimated: %w", err)
	}
	if estimate.Max > MaxConditionCost {
		return nil, fmt.Errorf("the condition could cost %d units for one request, %d at most; compare less text, or nest fewer all and exists",
			estimate.Max, MaxConditionCost)
	}
	program, err := c.env.Program(checked, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(MaxConditionCost))
	if err != nil {
		return nil, fmt.Errorf("the condition cannot be planned: %w", err)
	}
	return &condition{text: text, program: program, ast: checked.NativeRep(), open: reads(checked.NativeRep(), "context", "time")}, nil
}

// reads reports whether an expression names one of the variables.
func reads(a *ast.AST, names ...string) bool {
	found := false
	ast.PostOrderVisit(a.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		for _, name := range names {
			found = found || e.Kind() == ast.IdentKind && e.AsIdent() == name
		}
	}))
	return found
}

// explainIssues writes the first few faults of a text, with their places in it.
func explainIssues(issues *cel.Issues) error {
	const shown = 5
	var faults []string
	for i, e := range issues.Errors() {
		if i == shown {
			faults = append(faults, fmt.Sprintf("and %d more", len(issues.Errors())-shown))
			break
		}
		fault := e.Message + suggestion(e.Message)
		if e.Location.Line() > 0 {
			fault = fmt.Sprintf("line %d, column %d of the condition: %s", e.Location.Line(), e.Location.Column()+1, fault)
		}
		faults = append(faults, fault)
	}
	return errors.New(strings.Join(faults, "; "))
}

// suggestion is what to write instead of something that is not known.
func suggestion(message string) string {
	switch {
	case strings.Contains(message, "reference to 'matches'"):
		return "; there are no regular expressions here, use startsWith, endsWith or contains"
	case strings.Contains(message, "reference to"):
		return "; there are " + strings.Join(variables(), ", ") + ", and text stands in quotes"
	case strings.Contains(message, "undefined field"):
		return "; caller has " + strings.Join(fieldNames(callerType), ", ") + "; key has " + strings.Join(fieldNames(keyType), ", ")
	}
	return ""
}

func variables() []string { return []string{"caller", "key", "operation", "context", "time"} }

// sizes tells how large at most what a request holds is.
type sizes struct{}

// EstimateCallCost leaves all costs to CEL.
func (sizes) EstimateCallCost(string, string, *cost.AstNode, []cost.AstNode) *cost.CallEstimate {
	return nil
}

// EstimateSize knows the paths that lead to a request's values.
func (sizes) EstimateSize(node cost.AstNode) *cost.SizeEstimate {
	var most uint64
	switch path := strings.Join(node.Path(), "."); {
	case path == "context":
		most = maxContextPairs
	case strings.HasPrefix(path, "context."):
		most = maxContextText
	case path == "key.labels":
		most = maxLabels
	case strings.HasPrefix(path, "key."):
		most = maxLabelText
	case path == "caller.path":
		most = maxPathSegments
	case strings.HasPrefix(path, "caller."):
		most = maxIDText
	case path == "operation":
		most = MaxNameLength
	default:
		return nil
	}
	return &cost.SizeEstimate{Min: 0, Max: most}
}

// holds evaluates the condition. An error says why it cannot be evaluated; it
// never holds a value of the request.
func (c *condition) holds(v *requestVars) (bool, error) {
	out, _, err := c.program.Eval(v)
	if err != nil {
		return false, c.failure(err)
	}
	return out == types.True, nil
}

// failure says where an evaluation failed and why, without the values that CEL's
// own errors hold.
func (c *condition) failure(err error) error {
	var cancelled interpreter.EvalCancelledError
	if errors.As(err, &cancelled) {
		return fmt.Errorf("its evaluation costs more than %d units", MaxConditionCost)
	}
	why := "cannot be computed"
	for mark, meaning := range map[string]string{
		"no such key": "is missing", "index out of bounds": "is missing", "no such attribute": "is missing", errUnknown.Error(): "is not known",
	} {
		if strings.Contains(err.Error(), mark) {
			why = meaning
		}
	}
	what := "a value"
	var at *types.Err
	if errors.As(err, &at) {
		what = cmp.Or(c.snippet(at.NodeID()), what)
	}
	return fmt.Errorf("%s %s", what, why)
}
