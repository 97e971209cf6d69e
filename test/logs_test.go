package test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// docs/logs.md lists every message that the program logs, and no other.
func TestLogMessagesAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/logs.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(string(page), -1) {
		documented[m[1]] = true
	}
	logged := map[string]bool{}
	for _, file := range sources(t) {
		for _, message := range messages(t, file) {
			logged[message] = true
			if !documented[message] {
				t.Errorf("%s logs %q, which docs/logs.md does not list", file, message)
			}
		}
	}
	for message := range documented {
		if !logged[message] {
			t.Errorf("docs/logs.md lists %q, which nothing logs", message)
		}
	}
}

// sources lists the Go files of the agent and its plugins.
func sources(t *testing.T) []string {
	t.Helper()
	var files []string
	for _, root := range []string{"agent", "cache", "cmd", "identity", "plugins"} {
		err := filepath.WalkDir(filepath.Join("..", root), func(path string, _ fs.DirEntry, err error) error {
			if strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// messages finds what a file logs: constant first arguments of calls on a
// logger, and of the alarm that the core raises.
func messages(t *testing.T, file string) []string {
	t.Helper()
	tree, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	ast.Inspect(tree, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok || len(call.Args) == 0 {
			return true
		}
		method, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		message := 0
		if method.Sel.Name == "Log" && isLogger(method.X) {
			message = 1 // after the level
		}
		isLog := message == 1 || slices.Contains([]string{"Debug", "Info", "Warn", "Error"}, method.Sel.Name) && isLogger(method.X)
		if !isLog && method.Sel.Name != "alarm" {
			return true
		}
		literal, ok := call.Args[message].(*ast.BasicLit)
		switch {
		case ok:
			message, err := strconv.Unquote(literal.Value)
			if err != nil {
				t.Fatal(err)
			}
			found = append(found, message)
		case !isName(call.Args[message], "message"): // handed on by the alarm itself
			t.Errorf("%s: a log message that is no constant cannot be documented or searched for", file)
		}
		return true
	})
	return found
}

func isLogger(x ast.Expr) bool {
	switch x := x.(type) {
	case *ast.Ident:
		return strings.EqualFold(x.Name, "logger")
	case *ast.SelectorExpr:
		return strings.EqualFold(x.Sel.Name, "logger")
	}
	return false
}

func isName(x ast.Expr, name string) bool {
	id, ok := x.(*ast.Ident)
	return ok && id.Name == name
}
