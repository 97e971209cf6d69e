package policy

import (
	"errors"
	"maps"
	"slices"
	"strings"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/interpreter"
	"cel.dev/cel-go/parser"
)

// The types of the variables caller and key.
const (
	callerType = "Caller"
	keyType    = "Key"
)

// errUnknown is the failure of reading what nobody knows of a request.
var errUnknown = errors.New("not known")

// requestVars are the variables of one request.
type requestVars struct {
	Request
	path []string // of the caller, once somebody has asked for it
}

// ResolveName implements interpreter.Activation.
func (v *requestVars) ResolveName(name string) (any, bool) {
	switch name {
	case "caller", "key":
		return v, true
	case "operation":
		return types.String(v.Operation), true
	case "context":
		return v.Context, true
	case "time":
		return types.Timestamp{Time: v.Time.UTC()}, true
	}
	return nil, false
}

// Parent implements interpreter.Activation.
func (v *requestVars) Parent() interpreter.Activation { return nil }

func (v *requestVars) segments() []string {
	if v.path == nil {
		v.path = strings.Split(strings.TrimPrefix(v.Caller.ID.Path(), separator), separator)
	}
	return v.path
}

// field is one field of caller or key.
type field struct {
	name string
	kind *types.Type
	// get returns nil for what is not known.
	get func(*requestVars) any
}

func fields() map[string][]field {
	text := func(s string) any {
		if s == "" {
			return nil
		}
		return types.String(s)
	}
	return map[string][]field{
		callerType: {
			{"id", types.StringType, func(v *requestVars) any { return text(v.Caller.ID.String()) }},
			{"trust_domain", types.StringType, func(v *requestVars) any { return text(v.Caller.ID.TrustDomain().Name()) }},
			{"path", types.NewListType(types.StringType), func(v *requestVars) any { return v.segments() }},
			{"proof", types.StringType, func(v *requestVars) any { return text(string(v.Caller.Proof)) }},
			{"uid", types.IntType, func(v *requestVars) any { return v.peer(int64(v.Caller.Peer.UID)) }},
			{"gid", types.IntType, func(v *requestVars) any { return v.peer(int64(v.Caller.Peer.GID)) }},
			{"pid", types.IntType, func(v *requestVars) any {
				if v.Caller.Peer.PID <= 0 {
					return nil // of a process that this PID namespace does not see
				}
				return v.peer(int64(v.Caller.Peer.PID))
			}},
		},
		keyType: {
			{"name", types.StringType, func(v *requestVars) any { return text(v.Key) }},
			{"labels", types.NewMapType(types.StringType, types.StringType), func(v *requestVars) any { return v.Labels }},
		},
	}
}

func (v *requestVars) peer(n int64) any {
	if v.PeerUnknown {
		return nil
	}
	return types.Int(n)
}

func fieldNames(structType string) []string {
	var names []string
	for _, f := range fields()[structType] {
		names = append(names, f.name)
	}
	return names
}

func fieldTypes() map[string]map[string]*types.FieldType {
	all := make(map[string]map[string]*types.FieldType)
	for structType, list := range fields() {
		all[structType] = make(map[string]*types.FieldType)
		for _, f := range list {
			all[structType][f.name] = f.typed()
		}
	}
	return all
}

func (f field) typed() *types.FieldType {
	read := func(target any) any {
		if v, ok := target.(*requestVars); ok {
			return f.get(v)
		}
		return nil
	}
	return &types.FieldType{
		Type:  f.kind,
		IsSet: func(target any) bool { return read(target) != nil },
		GetFrom: func(target any) (any, error) {
			if value := read(target); value != nil {
				return value, nil
			}
			return nil, errUnknown
		},
	}
}

// provider adds the types of caller and key to CEL's own.
type provider struct {
	types.Provider
	fields map[string]map[string]*types.FieldType
}

// FindStructType implements types.Provider.
func (p *provider) FindStructType(name string) (*types.Type, bool) {
	if _, known := p.fields[name]; known {
		return types.NewTypeTypeWithParam(types.NewObjectType(name)), true
	}
	return p.Provider.FindStructType(name)
}

// FindStructFieldNames implements types.Provider.
func (p *provider) FindStructFieldNames(name string) ([]string, bool) {
	if known, ok := p.fields[name]; ok {
		return slices.Sorted(maps.Keys(known)), true
	}
	return p.Provider.FindStructFieldNames(name)
}

// FindStructFieldType implements types.Provider.
func (p *provider) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	if known, ok := p.fields[name]; ok {
		f, found := known[field]
		return f, found
	}
	return p.Provider.FindStructFieldType(name, field)
}

// snippet is the part of the condition's text that an expression was made from.
func (c *condition) snippet(id int64) string {
	var found string
	ast.PostOrderVisit(c.ast.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.ID() == id {
			found, _ = parser.Unparse(e, c.ast.SourceInfo())
		}
	}))
	return found
}
