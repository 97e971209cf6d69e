package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDocumentedCommandsExist: every command that the documentation shows, in a
// block or in a line, is a command of the program with flags that it has.
func TestDocumentedCommandsExist(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	examples, err := filepath.Glob("../../examples/*/README.md")
	if err != nil {
		t.Fatal(err)
	}
	shown := 0
	for _, page := range append(append(pages, examples...), "../../README.md", "../../SECURITY.md", "../../scripts/quickstart") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range commandLines(string(text)) {
			shown++
			checkCommand(t, filepath.Base(page), line)
		}
	}
	if shown < 40 {
		t.Errorf("only %d commands were found in the documentation", shown)
	}
}

var (
	// inline is a command in a sentence; block one at the beginning of a line.
	inline = regexp.MustCompile("`kms-agent ([^`]+)`")
	block  = regexp.MustCompile(`(?m)^\s*(?:\$ |# |sudo |run "\$agent" |ExecStart=\S*/)?(?:(?:\./)?bin/|\S*/)?kms-agent +([a-z][^\n]*)$|^run "\$agent" ([^\n]*)$`)
)

func commandLines(text string) []string {
	var lines []string
	for _, m := range inline.FindAllStringSubmatch(text, -1) {
		lines = append(lines, m[1])
	}
	for _, part := range codeBlocks(text) {
		for _, m := range block.FindAllStringSubmatch(strings.ReplaceAll(part, "\\\n", " "), -1) {
			lines = append(lines, m[1]+m[2])
		}
	}
	return lines
}

// codeBlocks returns what stands between fences or is indented by four; of a
// script, everything.
func codeBlocks(text string) []string {
	if strings.HasPrefix(text, "#!") {
		return []string{text}
	}
	var blocks []string
	parts := strings.Split(text, "```")
	for i, part := range parts {
		if i%2 == 1 {
			blocks = append(blocks, part)
			continue
		}
		for _, line := range strings.Split(part, "\n") {
			if strings.HasPrefix(line, "    ") {
				blocks = append(blocks, line)
			}
		}
	}
	return blocks
}

func checkCommand(t *testing.T, page, line string) {
	t.Helper()
	// What follows belongs to the shell or to the reader.
	for _, end := range []string{" | ", " > ", " < ", " && ", " || ", "   ", " #", "; "} {
		line, _, _ = strings.Cut(line, end)
	}
	words := strings.Fields(line)
	if words[0] == "COMMAND" { // any of them
		return
	}
	root := newRoot(newApp(os.Stdin, os.Stdout, os.Stderr, os.Getenv))
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd(words...)
	command, rest, err := root.Find(words)
	if err != nil || command == root && len(words) > 0 && !strings.HasPrefix(words[0], "-") {
		t.Errorf("%s shows %q: there is no such command", page, "kms-agent "+line)
		return
	}
	command.InitDefaultHelpFlag()
	for _, word := range rest {
		name, ok := strings.CutPrefix(word, "--")
		if !ok {
			continue
		}
		name, _, _ = strings.Cut(strings.TrimRight(name, ".,;:)]"), "=")
		if command.Flags().Lookup(name) == nil && command.InheritedFlags().Lookup(name) == nil {
			t.Errorf("%s shows %q: %s has no flag --%s", page, "kms-agent "+line, command.CommandPath(), name)
		}
	}
}
