package identity_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

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
}

// helper starts this test binary as another process.
func helper(t testing.TB, what, path string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"="+what, helperPath+"="+path)
	cmd.Stderr = os.Stderr
	return cmd
}

// helperConnect connects, leaves the connection to its own child, and ends.
func helperConnect() {
	conn, err := net.Dial("unix", os.Getenv(helperPath))
	if err != nil {
		panic(err)
	}
	if _, err := conn.Write([]byte("P")); err != nil {
		panic(err)
	}
	file, err := conn.(*net.UnixConn).File()
	if err != nil {
		panic(err)
	}
	child := exec.Command("sleep", "60")
	child.ExtraFiles = []*os.File{file}
	if err := child.Start(); err != nil {
		panic(err)
	}
	_, _ = os.Stdout.WriteString("left\n")
	_, _ = os.Stdin.Read(make([]byte, 1)) // until the test has looked
	_ = child.Process.Kill()
	_, _ = child.Process.Wait()
}

// A connection may outlive the process that the kernel names.
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
	deadline := time.Now().Add(patience)
	for ended := false; !ended; {
		if ended, _ = authInfo.PeerExited(); time.Now().After(deadline) {
			t.Fatal("the peer has ended and is said to live")
		}
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if _, known := authInfo.PeerExited(); known {
		t.Fatal("the pidfd was kept after the connection was closed")
	}
}
