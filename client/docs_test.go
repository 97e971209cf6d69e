package client_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The code of docs/go-sdk.md compiles.
func TestDocumentedCode(t *testing.T) {
	page, err := os.ReadFile("../docs/go-sdk.md")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.WriteString(`package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/client"
)

func main() {}
`)
	blocks := strings.Split(string(page), "```go\n")[1:]
	for i, block := range blocks {
		code, _, closed := strings.Cut(block, "```")
		if !closed {
			t.Fatalf("block %d has no end", i)
		}
		if !strings.Contains(code[strings.LastIndex(strings.TrimSpace(code), "\n")+1:], "return") {
			code += "return nil\n"
		}
		fmt.Fprintf(&b, "\nfunc block%d(ctx context.Context, c *client.Client, file *os.File, data, message []byte, report any) error {\n%s}\n", i, code)
	}
	b.WriteString("\nvar _, _, _, _, _, _, _ = json.Marshal, errors.Is, io.EOF, log.Print, time.Now, spiffeid.MatchAny, fmt.Sprint\n")
	file := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "go", "vet", file).CombinedOutput(); err != nil || len(blocks) < 7 {
		t.Errorf("%d blocks: %v\n%s\n%s", len(blocks), err, out, b.String())
	}
}
