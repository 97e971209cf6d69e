package agent

import (
	_ "embed"
	"strings"
)

//go:embed config_reference.md
var configReference string

// ConfigReference returns the reference of all fields as it stands in
// docs/configuration.md.
func ConfigReference() string { return configReference }

// FieldDoc describes one field of the configuration, in Markdown.
type FieldDoc struct {
	// Path is as in faults: "keys[].cache.max_age".
	Path string `json:"path"`
	// Value says what may be written, Default what holds without: "required" and
	// "none" too.
	Value   string `json:"value"`
	Default string `json:"default"`
	Meaning string `json:"meaning"`
}

// ExplainConfig returns the fields at or below a path; all of them for "". Indexes
// are as good as none: "keys[0].name", "keys[].name" and "keys.name" are one.
func ExplainConfig(path string) []FieldDoc {
	wanted := plainPath(path)
	var found []FieldDoc
	for line := range strings.Lines(configReference) {
		rest, ok := strings.CutPrefix(line, "| `")
		if !ok {
			continue
		}
		cells := strings.Split(strings.TrimRight(rest, " |\n"), " | ")
		if len(cells) != 4 {
			continue
		}
		f := FieldDoc{Path: strings.TrimSuffix(cells[0], "`"), Value: cells[1], Default: cells[2], Meaning: cells[3]}
		if own := plainPath(f.Path); wanted == "" || own == wanted || strings.HasPrefix(own, wanted+".") {
			found = append(found, f)
		}
	}
	return found
}

// plainPath leaves out indexes.
func plainPath(path string) string {
	var b strings.Builder
	inside := false
	for _, c := range path {
		switch {
		case c == '[':
			inside = true
		case c == ']':
			inside = false
		case !inside:
			b.WriteRune(c)
		}
	}
	return b.String()
}
