package identity_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/kms-agent/kms-agent/identity"
)

// helperEnv chooses what this test binary does instead of testing.
const (
	helperEnv  = "IDENTITY_TEST_HELPER"
	helperPath = "IDENTITY_TEST_PATH"
)

var helperProcesses = map[string]func(){
	"connect": helperConnect,
	"listen":  helperListen,
	"units":   helperUnits,
}

// helper starts this test binary as another process.
func helper(t testing.TB, what, path string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"="+what, helperPath+"="+path)
	cmd.Stderr = os.Stderr
	return cmd
}

// helperConnect connects and ends when it is told to.
func helperConnect() {
	conn, err := net.Dial("unix", os.Getenv(helperPath))
	if err != nil {
		panic(err)
	}
	if _, err := conn.Write([]byte("P")); err != nil {
		panic(err)
	}
	_, _ = os.Stdin.Read(make([]byte, 1))
}

func TestPeerExited(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	l, err := identity.Listen(t.Context(), path, 0o600, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	creds, err := identity.NewCredentials(identity.Config{})
	if err != nil {
		t.Fatal(err)
	}
	cmd := helper(t, "connect", path)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	raw, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn, info, err := creds.ServerHandshake(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	authInfo, ok := info.(*identity.Conn)
	if !ok {
		t.Fatalf("AuthInfo is %T", info)
	}
	if int(authInfo.Peer.PID) != cmd.Process.Pid {
		t.Fatalf("the peer is process %d, want %d", authInfo.Peer.PID, cmd.Process.Pid)
	}
	if ended, known := authInfo.PeerExited(); ended || !known {
		t.Fatalf("a living peer: exited %v, known %v", ended, known)
	}
	_ = stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if ended, known := authInfo.PeerExited(); !ended || !known {
		t.Fatalf("a dead peer: exited %v, known %v", ended, known)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if _, known := authInfo.PeerExited(); known {
		t.Fatal("the pidfd was kept after the connection was closed")
	}
}
