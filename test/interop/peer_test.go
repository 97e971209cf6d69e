// Package interop_test reads what an implementation of the message format that
// is not ours wrote, and lets it read what we wrote: the AWS Encryption SDK for
// JavaScript, run by Node.
//
// By default it tries a few messages; with INTEROP=full (make interop) many.
package interop_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// full says that many sizes, contexts and frame lengths are to be tried.
func full() bool { return os.Getenv("INTEROP") == "full" }

const cure = "interop needs Node 18 or newer and npm (Debian: apt-get install nodejs npm), and npm's registry for the first run"

// installed is the file that says which lock file node_modules is of.
const installed = "node/node_modules/.installed-lock-sha256"

// peer is the running implementation of others.
type peer struct {
	in  *json.Encoder
	out *bufio.Reader
}

type rawAESKey struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Key       []byte `json:"key"`
}

type request struct {
	Operation   string            `json:"operation"`
	Keys        []rawAESKey       `json:"keys"`
	Context     map[string]string `json:"context,omitempty"`
	FrameLength int               `json:"frameLength,omitempty"`
	Data        []byte            `json:"data"`
}

type reply struct {
	Data        []byte
	Context     map[string]string
	Suite       int
	FrameLength int
	Error       string
}

// do asks the peer. An error of the peer's is returned, any other ends the test.
func (p *peer) do(t *testing.T, r request) (reply, error) {
	t.Helper()
	if r.Data == nil {
		r.Data = []byte{}
	}
	if err := p.in.Encode(r); err != nil {
		t.Fatalf("ask node: %v", err)
	}
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		t.Fatalf("node did not answer: %v", err)
	}
	var answer reply
	if err := json.Unmarshal(line, &answer); err != nil {
		t.Fatalf("answer of node: %v", err)
	}
	if answer.Error != "" {
		return reply{}, errors.New(answer.Error)
	}
	return answer, nil
}

// startPeer installs what the peer needs and starts it for the test's duration.
func startPeer(t *testing.T) *peer {
	t.Helper()
	install(t)
	cmd := exec.CommandContext(t.Context(), "node", "peer.mjs")
	cmd.Dir = "node"
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start node: %v; %s", err, cure)
	}
	t.Cleanup(func() {
		_ = in.Close() // its standard input's end ends it; t.Context would kill it
		if err := cmd.Wait(); err != nil && t.Context().Err() == nil {
			t.Errorf("node: %v\n%s", err, &stderr)
		}
	})
	return &peer{in: json.NewEncoder(in), out: bufio.NewReader(out)}
}

// install runs npm ci unless node_modules is of this very lock file.
func install(t *testing.T) {
	t.Helper()
	if err := installPackages(t); err != nil {
		t.Fatalf("%v\n%s", err, cure)
	}
}

func installPackages(t *testing.T) error {
	lock, err := os.ReadFile("node/package-lock.json")
	if err != nil {
		return err
	}
	sum := sha256.Sum256(lock)
	want := hex.EncodeToString(sum[:])
	if got, err := os.ReadFile(installed); err == nil && string(got) == want {
		return nil
	}
	cmd := exec.CommandContext(t.Context(), "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	cmd.Dir = "node"
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("npm ci in test/interop/node: %w\n%s", err, out)
	}
	return os.WriteFile(filepath.FromSlash(installed), []byte(want), 0o600)
}
