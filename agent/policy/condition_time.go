package policy

import (
	"fmt"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
)

// zones are the time zones that the conditions of one policy name. They are read
// from the host when the policy is compiled: CEL's own functions would read them
// at each evaluation. Nothing changes them afterwards.
type zones map[string]*time.Location

// zoneFunctions are the functions of a time that take a zone, with the names of
// CEL's own overloads, which are replaced.
func zoneFunctions() map[string]string {
	return map[string]string{
		overloads.TimeGetFullYear:     overloads.TimestampToYearWithTz,
		overloads.TimeGetMonth:        overloads.TimestampToMonthWithTz,
		overloads.TimeGetDayOfYear:    overloads.TimestampToDayOfYearWithTz,
		overloads.TimeGetDayOfMonth:   overloads.TimestampToDayOfMonthZeroBasedWithTz,
		overloads.TimeGetDate:         overloads.TimestampToDayOfMonthOneBasedWithTz,
		overloads.TimeGetDayOfWeek:    overloads.TimestampToDayOfWeekWithTz,
		overloads.TimeGetHours:        overloads.TimestampToHoursWithTz,
		overloads.TimeGetMinutes:      overloads.TimestampToMinutesWithTz,
		overloads.TimeGetSeconds:      overloads.TimestampToSecondsWithTz,
		overloads.TimeGetMilliseconds: overloads.TimestampToMillisecondsWithTz,
	}
}

// functions declares them over z, which is filled by load.
func (z zones) functions() []cel.EnvOption {
	var options []cel.EnvOption
	for name, overload := range zoneFunctions() {
		options = append(options, cel.Function(name, cel.MemberOverload(overload+"_loaded",
			[]*cel.Type{cel.TimestampType, cel.StringType}, cel.IntType,
			cel.BinaryBinding(func(at, zone ref.Val) ref.Val {
				t, isTime := at.(types.Timestamp)
				text, isText := zone.(types.String)
				location := z[string(text)]
				if !isTime || !isText || location == nil {
					return types.NoSuchOverloadErr()
				}
				return types.Timestamp{Time: t.In(location)}.Receive(name, overload, nil)
			}))))
	}
	return options
}

// load reads the zones that an expression names.
func (z zones) load(a *ast.AST) error {
	var fault error
	ast.PostOrderVisit(a.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() != ast.CallKind || fault != nil {
			return
		}
		call := e.AsCall()
		if _, zoned := zoneFunctions()[call.FunctionName()]; zoned && len(call.Args()) == 1 {
			fault = z.add(call.Args()[0])
		}
	}))
	return fault
}

func (z zones) add(e ast.Expr) error {
	if e.Kind() != ast.LiteralKind {
		return fmt.Errorf("a time zone must be written out, such as %q", "Europe/Berlin")
	}
	name, _ := e.AsLiteral().Value().(string)
	if name == "" || strings.EqualFold(name, "local") {
		return fmt.Errorf("%q is not a time zone; write its name, such as %q or %q", name, "Europe/Berlin", "UTC")
	}
	location, err := time.LoadLocation(name)
	if err != nil {
		return fmt.Errorf("%q is not a time zone of this host (%w); write a name such as %q, or install the package tzdata", name, err, "Europe/Berlin")
	}
	z[name] = location
	return nil
}
