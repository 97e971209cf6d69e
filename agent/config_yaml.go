package agent

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/agent/policy"
)

// Bounds that keep the YAML parser, which recurses, from a stack without end: a
// block cannot be nested deeper than the column where it begins.
const (
	maxFlowDepth   = 32
	maxBlockColumn = 200
	// maxEntries bounds a block mapping: the parser's time grows with the square
	// of its entries. Lists are as long as the file.
	maxEntries = 1000
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
	// elsewhere: of another host, whose accounts are not known here.
	elsewhere bool
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
// tags or second document. With elsewhere, users and groups that this host does
// not know are left at 0.
func decodeYAML(file string, data []byte, target any, elsewhere bool) *document {
	d := &document{file: file, places: map[string]location{"": {1, 1}}, elsewhere: elsewhere}
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
	if d.full() {
		return
	}
	d.faults = append(d.faults, Fault{d.file, at.line, at.column, path, fmt.Sprintf(format, a...)})
}

// full says that no more faults are told of the document.
func (d *document) full() bool { return len(d.faults) == maxFaults }

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
	data = bytes.TrimPrefix(data, []byte("\ufeff")) // what some editors begin UTF-8 with
	if !utf8.Valid(data) {
		d.report("", "this is not UTF-8 text; save the file as UTF-8")
		return nil
	}
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
	var open blockMappings
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
			if depth == 0 && open.met(t) > maxEntries {
				d.reportAt(position(t), "", "this mapping has more than %d entries", maxEntries)
				return false
			}
		default:
		}
		if depth > maxFlowDepth {
			d.reportAt(position(t), "", "this is nested too deeply")
			return false
		}
	}
	return len(d.faults) == before
}

// blockMappings are those that the next token may belong to, outermost first.
type blockMappings []struct{ column, entries int }

// met takes the mark of an entry, and returns how many the mapping has so far.
func (b *blockMappings) met(mark *token.Token) int {
	at := mark.Position
	if key := mark.Prev; mark.Type == token.MappingValueType && key != nil && key.Position.Line == at.Line {
		at = key.Position
	}
	for len(*b) > 0 && (*b)[len(*b)-1].column > at.Column {
		*b = (*b)[:len(*b)-1]
	}
	if mark.Type != token.MappingValueType {
		return 0
	}
	if n := len(*b); n == 0 || (*b)[n-1].column < at.Column {
		*b = append(*b, struct{ column, entries int }{at.Column, 0})
	}
	last := &(*b)[len(*b)-1]
	last.entries++
	return last.entries
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
	case t == reflect.TypeFor[Size](), t == reflect.TypeFor[policy.Bytes]():
		return "a size, such as 4MiB"
	case t == reflect.TypeFor[policy.Rate]():
		return "a rate, such as 500/s, 30/m or 1000/h"
	case t == reflect.TypeFor[UID](), t == reflect.TypeFor[GID]():
		return "a number or a name"
	case t == reflect.TypeFor[policy.Effect]():
		return "allow or deny"
	case t == reflect.TypeFor[policy.Condition]():
		return "a condition, such as context.tenant == caller.path[1]; without one, remove the line"
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
