package hsm

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// docs/hsm.md tells all codes that we know: each once, with others that ask for the same.
func TestCodesAreTold(t *testing.T) {
	page, err := os.ReadFile("../docs/hsm.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(page), "\n## Codes\n")
	table, _, _ = strings.Cut(table, "\n## ")
	known := map[string]cryptoki.Error{}
	for code := range cryptoki.Error(0x400) {
		known[code.Name()] = code
	}
	told := map[cryptoki.Error]bool{}
	for row := range strings.Lines(table) {
		cell, _, found := strings.Cut(strings.TrimPrefix(row, "| "), " |")
		if !found {
			continue
		}
		names := regexp.MustCompile(`CKR_\w+`).FindAllString(cell, -1)
		for _, name := range names {
			code, ok := known[name]
			if !ok || code == 0 || told[code] {
				t.Errorf("%s is no code, is no failure, or stands twice", name)
			}
			told[code] = true
			if first := known[names[0]]; stepFor(code) != stepFor(first) || code.Policy() != first.Policy() {
				t.Errorf("%s asks for something else than %s", name, names[0])
			}
		}
	}
	for _, code := range known {
		if s := stepFor(code); s != askCanary && !told[code] {
			t.Errorf("%v is not told", code)
		}
	}
	if len(told) < 50 {
		t.Errorf("%d codes are told", len(told))
	}
}
