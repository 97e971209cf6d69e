package agent

import (
	"os"
	"path/filepath"
	"testing"
)

// What was read of a file is kept until it changes, and no longer than it is named.
func TestPrewarmForgetsFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := newPrewarmer()
	pattern := []string{filepath.Join(dir, "*.jsonl")}
	for _, names := range [][]string{{"a.jsonl", "b.jsonl"}, {"b.jsonl"}, {"c.jsonl"}, {}} {
		old, _ := filepath.Glob(pattern[0])
		for _, path := range old {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range names {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("{}\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		p.read(pattern)
		p.forget()
		if len(p.files) != len(names) {
			t.Errorf("%d files are remembered, want the %d that are there", len(p.files), len(names))
		}
		for _, name := range names {
			if _, ok := p.files[filepath.Join(dir, name)]; !ok {
				t.Errorf("%s is not remembered", name)
			}
		}
	}
}
