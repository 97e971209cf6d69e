package agent

import (
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds that keep the YAML parser, which recurses, from a stack without end: a
// block cannot be nested deeper than the column where it begins.
const (
	maxFlowDepth   = 32
	maxBlockColumn = 200
)

// location is a place in a file.
type location struct{ line, column int }

// document decodes one YAML file into Go values and collects everything that
// is wrong with it instead of stopping at the first fault.
type document struct {
	file   string
	faults Faults
	// places has the location of every value met, by its path.
	places map[string]location
	// parsed is false where data is not one YAML document.
	parsed bool
	// undecoded is how many of faults are of decoding.
	undecoded int
}

// has says whether path stands in the document.
func (d *document) has(path string) bool {
	_, ok := d.places[path]
	return ok
}

// defaulter is implemented by elements of lists; defaults stand in an element
// before the file's values are laid over them.
type defaulter interface{ setDefaults() }

// decodeYAML lays the YAML document in data over target, a pointer. The
// document is strict: every field known and given once, no anchors, aliases,
// tags or second document.
func decodeYAML(file string, data []byte, target any) *document {
	d := &document{file: file, places: map[string]location{"": {1, 1}}}
	if body := d.parse(data); body != nil {
		d.parsed = true
		d.value(body, reflect.ValueOf(target).Elem(), "")
	}
	d.undecoded = len(d.faults)
	return d
}

// failed says whether the value at path, or one that holds it, did not decode.
func (d *document) failed(path string) bool {
	return slices.ContainsFunc(d.faults[:d.undecoded], func(f Fault) bool {
		return f.Path == "" || f.Path == path || strings.HasPrefix(path, f.Path+".") || strings.HasPrefix(path, f.Path+"[")
	})
}

// report adds a fault at the place of path, or of what encloses it.
func (d *document) report(path, format string, a ...any) {
	d.reportAt(d.locate(path), path, format, a...)
}

func (d *document) reportAt(at location, path, format string, a ...any) {
	if len(d.faults) == maxFaults {
		return
	}
	d.faults = append(d.faults, Fault{d.file, at.line, at.column, path, fmt.Sprintf(format, a...)})
}

// locate finds the place of path: its own, else that of its nearest parent.
func (d *document) locate(path string) location {
	for {
		if at, ok := d.places[path]; ok {
			return at
		}
		path = path[:max(0, strings.LastIndexAny(path, ".["))]
	}
}

func (d *document) parse(data []byte) ast.Node {
	tokens := lexer.Tokenize(string(data))
	if !d.checkTokens(tokens) {
		return nil
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	var syntax *yaml.SyntaxError
	switch {
	case errors.As(err, &syntax) && syntax.Token != nil:
		d.reportAt(position(syntax.Token), "", "this is not YAML: %s", syntax.Message)
	case err != nil:
		d.report("", "this is not YAML: %v", err)
	case len(file.Docs) > 1:
		d.reportAt(position(file.Docs[1].Start), "", "a second document begins here; one file holds one document")
	case len(file.Docs) == 0 || file.Docs[0].Body == nil:
		d.report("", "the file is empty")
	default:
		return file.Docs[0].Body
	}
	return nil
}

// checkTokens refuses what has no place in a configuration, and nesting that
// would exhaust the parser, before anything recurses.
func (d *document) checkTokens(tokens token.Tokens) bool {
	depth, before := 0, len(d.faults)
	for _, t := range tokens {
		switch t.Type {
		case token.AnchorType, token.AliasType, token.MergeKeyType, token.TagType, token.DirectiveType:
			d.reportAt(position(t), "", "%s: anchors, aliases, merges, tags and directives are not allowed; write the value itself",
				quote(t.Value))
		case token.InvalidType:
			d.reportAt(position(t), "", "this is not YAML: %s", t.Error)
			return false
		case token.SequenceStartType, token.MappingStartType:
			depth++
		case token.SequenceEndType, token.MappingEndType:
			depth--
		case token.SequenceEntryType, token.MappingKeyType, token.MappingValueType:
			if depth == 0 && t.Position.Column > maxBlockColumn {
				depth = maxFlowDepth + 1
			}
		}
		if depth > maxFlowDepth {
			d.reportAt(position(t), "", "this is nested too deeply")
			return false
		}
	}
	return len(d.faults) == before
}

// value decodes node into target by target's type.
func (d *document) value(node ast.Node, target reflect.Value, path string) {
	if _, null := node.(*ast.NullNode); null {
		d.report(path, "has no value; write one, or remove the line")
		return
	}
	if target.Kind() == reflect.Pointer {
		target.Set(reflect.New(target.Type().Elem()))
		target = target.Elem()
	}
	switch {
	case target.Type() == reflect.TypeFor[Settings]():
		d.settings(node, target, path)
	case isScalar(target):
		d.scalar(node, target, path)
	case target.Kind() == reflect.Struct:
		d.structure(node, target, path)
	case target.Kind() == reflect.Slice:
		d.list(node, target, path)
	case target.Kind() == reflect.Map:
		d.mapping(node, target, path)
	default:
		panic("agent: no way to decode " + target.Type().String())
	}
}

// entries calls each for every key of a mapping, in order, each key once.
func (d *document) entries(node ast.Node, path, want string, each func(key, path string, value ast.Node)) {
	pairs, ok := node.(ast.MapNode)
	if !ok {
		d.report(path, "must be %s, not %s", want, kindOf(node))
		return
	}
	first := map[string]location{}
	for iter := pairs.MapRange(); iter.Next(); {
		key, ok := iter.Key().(*ast.StringNode)
		if !ok {
			d.reportAt(position(iter.Key().GetToken()), path, "the key %s must be a string; put it in quotes",
				quote(iter.Key().GetToken().Value))
			continue
		}
		at, child := position(key.GetToken()), join(path, key.Value)
		if earlier, twice := first[key.Value]; twice {
			d.reportAt(at, child, "is given twice; the first is in line %d", earlier.line)
			continue
		}
		first[key.Value] = at
		d.places[child] = at
		if scalar, ok := iter.Value().(ast.ScalarNode); ok && scalar.GetToken().Value != "" {
			d.places[child] = position(scalar.GetToken())
		}
		each(key.Value, child, iter.Value())
	}
}

func (d *document) structure(node ast.Node, target reflect.Value, path string) {
	if defaults, ok := target.Addr().Interface().(defaulter); ok {
		defaults.setDefaults()
	}
	fields, known := fieldsOf(target)
	d.entries(node, path, "a mapping (name: value)", func(key, path string, value ast.Node) {
		field, ok := fields[key]
		if !ok {
			d.reportAt(d.places[path], path, "this field %s", strings.TrimPrefix(unknownWord(key, known), quote(key)+" "))
			return
		}
		d.value(value, field, path)
	})
}

func (d *document) mapping(node ast.Node, target reflect.Value, path string) {
	target.Set(reflect.MakeMap(target.Type()))
	d.entries(node, path, "a mapping (name: value)", func(key, path string, value ast.Node) {
		element := reflect.New(target.Type().Elem()).Elem()
		d.value(value, element, path)
		target.SetMapIndex(reflect.ValueOf(key).Convert(target.Type().Key()), element)
	})
}

func (d *document) list(node ast.Node, target reflect.Value, path string) {
	sequence, ok := node.(*ast.SequenceNode)
	if !ok {
		d.report(path, "must be a list, not %s", kindOf(node))
		return
	}
	target.Set(reflect.MakeSlice(target.Type(), len(sequence.Values), len(sequence.Values)))
	for i, element := range sequence.Values {
		child := path + "[" + strconv.Itoa(i) + "]"
		d.places[child] = startOf(element)
		d.value(element, target.Index(i), child)
	}
}

func isScalar(target reflect.Value) bool {
	if _, ok := target.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return true
	}
	return target.Kind() == reflect.String || target.Kind() == reflect.Bool || target.CanInt() || target.CanUint()
}

// scalar decodes one word. Types that read their own text do so; numbers and
// booleans are never taken for strings, which would hide a missing quote.
func (d *document) scalar(node ast.Node, target reflect.Value, path string) {
	want := describe(target.Type())
	scalar, ok := node.(ast.ScalarNode)
	if !ok {
		d.report(path, "must be %s, not %s", want, kindOf(node))
		return
	}
	text, isString := scalar.GetToken().Value, false
	switch n := node.(type) {
	case *ast.StringNode:
		text, isString = n.Value, true
	case *ast.LiteralNode:
		text, isString = n.Value.Value, true
	}
	_, isBool := node.(*ast.BoolNode)
	if reader, ok := target.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if isBool || text == "" {
			d.report(path, "must be %s", want)
		} else if err := reader.UnmarshalText([]byte(text)); err != nil {
			d.report(path, "%s", explain(err, target.Type(), text))
		}
		return
	}
	var err error
	switch {
	case target.Kind() == reflect.String && isString:
		target.SetString(text)
	case target.Kind() == reflect.String:
		d.report(path, "must be a string, not %s; put it in quotes", kindOf(node))
	case target.Kind() == reflect.Bool && isBool:
		target.SetBool(node.(*ast.BoolNode).Value)
	case target.Type() == reflect.TypeFor[time.Duration]():
		var duration time.Duration
		if duration, err = time.ParseDuration(text); err == nil {
			target.SetInt(int64(duration))
		}
	default:
		err = d.number(node, target)
	}
	if err != nil {
		d.report(path, "must be %s, not %s", want, quote(text))
	}
}

var errNotANumber = errors.New("not a number of the type")

func (d *document) number(node ast.Node, target reflect.Value) error {
	integer, ok := node.(*ast.IntegerNode)
	if !ok {
		return errNotANumber
	}
	var signed int64
	var unsigned uint64
	switch n := integer.Value.(type) {
	case uint64:
		unsigned, signed = n, int64(min(n, math.MaxInt64))
	case int64:
		signed = n
		if n < 0 && target.CanUint() {
			return errNotANumber
		}
		unsigned = uint64(n)
	}
	switch {
	case target.CanInt() && !target.OverflowInt(signed):
		target.SetInt(signed)
	case target.CanUint() && !target.OverflowUint(unsigned):
		target.SetUint(unsigned)
	default:
		return errNotANumber
	}
	return nil
}

// settings turns a mapping of any shape into a JSON object.
func (d *document) settings(node ast.Node, target reflect.Value, path string) {
	if _, ok := node.(ast.MapNode); !ok {
		d.report(path, "must be a mapping (name: value), not %s", kindOf(node))
		return
	}
	encoded, err := json.Marshal(d.plain(node, path))
	if err != nil {
		d.report(path, "has no JSON form: %v", err)
		return
	}
	target.SetBytes(encoded)
}

// plain turns a node into the Go value that encoding/json writes.
func (d *document) plain(node ast.Node, path string) any {
	switch n := node.(type) {
	case *ast.NullNode:
		return nil
	case ast.MapNode:
		object := map[string]any{}
		d.entries(node, path, "a mapping", func(key, path string, value ast.Node) {
			object[key] = d.plain(value, path)
		})
		return object
	case *ast.SequenceNode:
		list := make([]any, len(n.Values))
		for i, element := range n.Values {
			child := path + "[" + strconv.Itoa(i) + "]"
			d.places[child] = startOf(element)
			list[i] = d.plain(element, child)
		}
		return list
	case *ast.InfinityNode, *ast.NanNode:
		d.report(path, "must be a finite number")
		return nil
	case ast.ScalarNode:
		return n.GetValue()
	default:
		d.report(path, "%s is not allowed here", kindOf(node))
		return nil
	}
}

// fieldsOf lists a struct's fields by their names in YAML: the tag's, or for
// types of other packages the field's own in snake case.
func fieldsOf(target reflect.Value) (map[string]reflect.Value, []string) {
	fields, names := map[string]reflect.Value{}, []string{}
	for i := range target.NumField() {
		field := target.Type().Field(i)
		if !field.IsExported() {
			continue
		}
		name := fieldName(field)
		fields[name] = target.Field(i)
		names = append(names, name)
	}
	return fields, names
}

func fieldName(field reflect.StructField) string {
	if name, ok := field.Tag.Lookup("yaml"); ok {
		return name
	}
	var name strings.Builder
	for i, r := range field.Name {
		if i > 0 && r >= 'A' && r <= 'Z' {
			name.WriteByte('_')
		}
		name.WriteRune(r)
	}
	return strings.ToLower(name.String())
}

// describe says what a value of type t looks like.
func describe(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "a duration, such as 30s, 5m or 24h"
	case t == reflect.TypeFor[spiffeid.ID]():
		return "a SPIFFE ID, such as spiffe://example.org/ns/shop/sa/orders"
	case t == reflect.TypeFor[spiffeid.TrustDomain]():
		return "a trust domain, such as example.org"
	case t == reflect.TypeFor[Size]():
		return "a size, such as 4MiB"
	case t == reflect.TypeFor[UID](), t == reflect.TypeFor[GID]():
		return "a number or a name"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.String:
		return "a string"
	default:
		return "a whole number"
	}
}

// explain says why text is not a t.
func explain(err error, t reflect.Type, text string) string {
	if t.PkgPath() == reflect.TypeFor[Config]().PkgPath() {
		return err.Error()
	}
	return fmt.Sprintf("%s is not %s: %v", quote(text), describe(t), err)
}

func kindOf(node ast.Node) string {
	switch node.(type) {
	case ast.MapNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.StringNode, *ast.LiteralNode:
		return "a string"
	case *ast.BoolNode:
		return "a truth value"
	case *ast.NullNode:
		return "nothing"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	default:
		return "this kind of value"
	}
}

func position(t *token.Token) location {
	if t == nil || t.Position == nil {
		return location{1, 1}
	}
	return location{t.Position.Line, t.Position.Column}
}

// startOf is where a list's element begins; a mapping begins at its first key.
func startOf(node ast.Node) location {
	if pairs, ok := node.(ast.MapNode); ok {
		if iter := pairs.MapRange(); iter.Next() {
			return position(iter.Key().GetToken())
		}
	}
	return position(node.GetToken())
}

// join appends a key to a path.
func join(path, key string) string {
	plain := func(r rune) bool { return r == '_' || r == '-' || unicode.IsLetter(r) || unicode.IsDigit(r) }
	switch {
	case key == "" || strings.ContainsFunc(key, func(r rune) bool { return !plain(r) }):
		return path + "[" + quote(key) + "]"
	case path == "":
		return key
	default:
		return path + "." + key
	}
}
