package agent

import (
	"encoding"
	"encoding/json"
	"errors"
	"math"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/kms-agent/kms-agent/agent/policy"
)

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
		} else if err := reader.UnmarshalText([]byte(text)); err != nil && (!d.elsewhere || !errors.Is(err, errNoAccount)) {
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
	case target.Type() == reflect.TypeFor[policy.Bytes]():
		var size Size
		if err = size.UnmarshalText([]byte(text)); err == nil {
			target.SetUint(uint64(size))
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
