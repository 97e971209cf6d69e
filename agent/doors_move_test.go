package agent_test

import (
	"bytes"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	"github.com/kms-agent/kms-agent/client"
)

// reloadAt asks an agent at an admin socket to read its configuration.
func (r *rig) reloadAt(socket string) error {
	r.t.Helper()
	conn, err := grpc.NewClient("unix:"+r.path(socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, err = adminv1.NewAdminClient(conn).Reload(r.t.Context(), &adminv1.ReloadRequest{})
	return err
}

func movable() string {
	return strings.NewReplacer("static_peers: []", "static_peers: ["+staticPeer()+"]", "operations: [status]", "operations: [break-glass]").Replace(configText())
}

// A reload moves the administrators' socket while calls come in: none fails. A configuration that cannot be had changes nothing.
func TestSocketsChangeUnderLoad(t *testing.T) {
	r := newRig(t, movable())
	r.start()
	var stop atomic.Bool
	var calls atomic.Int64
	var load sync.WaitGroup
	for range 3 {
		load.Go(func() {
			c := r.as("peer")
			for !stop.Load() {
				if _, err := c.Encrypt(t.Context(), &client.EncryptRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
					t.Errorf("a call: %v", err)
					return
				}
				calls.Add(1)
			}
		})
	}
	sockets := []string{"admin.sock", "admin-2.sock"}
	for i := range 12 {
		at, next := sockets[i%2], sockets[(i+1)%2]
		r.write(strings.Replace(movable(), "admin: { socket: admin.sock", "admin: { socket: "+next, 1))
		if err := r.reloadAt(at); err != nil {
			t.Fatalf("reload %d: %v", i, err)
		}
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			if _, err := os.Stat(r.path(at)); os.IsNotExist(err) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("reload %d: the old socket is still there", i)
			}
		}
	}
	for _, tc := range []struct{ what, old, next, want string }{
		{"a socket in no directory", "admin: { socket: admin.sock", "admin: { socket: nowhere/admin.sock", "admin socket"},
		{"the agent's other socket", "admin: { socket: admin.sock", "admin: { socket: kms.sock", "socket"},
		{"another mode", `mode: "0600"`, `mode: "0660"`, "listen.native.mode"},
	} {
		r.write(strings.Replace(movable(), tc.old, tc.next, 1))
		if err := r.reloadAt("admin.sock"); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want that it names %s", tc.what, err, tc.want)
		}
	}
	if _, err := r.status(); err != nil {
		t.Errorf("after a reload that failed: %v", err)
	}
	stop.Store(true)
	load.Wait()
	t.Logf("%d calls", calls.Load())
}

// A native socket that moves serves what is under way to its end, and nobody new.
func TestNativeSocketMoves(t *testing.T) {
	r := newRig(t, movable())
	r.start()
	c := r.as("peer")
	if _, err := c.Encrypt(t.Context(), &client.EncryptRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	plain, write := io.Pipe()
	var message bytes.Buffer
	streamed := make(chan error, 1)
	go func() {
		_, err := c.EncryptStream(t.Context(), &client.EncryptStreamStart{Key: "orders"}, plain, &message)
		streamed <- err
	}()
	if _, err := write.Write(make([]byte, 100<<10)); err != nil { // more than a frame: the stream is under way
		t.Fatal(err)
	}
	r.write(strings.Replace(movable(), `socket: kms.sock, mode: "0600"`, `socket: elsewhere.sock, mode: "0660"`, 1))
	if err := r.reloadAt("admin.sock"); err != nil {
		t.Fatal(err)
	}
	moved, err := client.Dial(t.Context(), client.Options{Socket: r.path("elsewhere.sock"), Retry: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = moved.Close() }()
	if _, err := moved.Encrypt(t.Context(), &client.EncryptRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
		t.Errorf("at the new socket: %v", err)
	}
	if info, err := os.Stat(r.path("elsewhere.sock")); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("the new socket: %v, %v; want mode 0660", info, err)
	}
	if _, err := write.Write([]byte("the end")); err != nil {
		t.Error(err)
	}
	_ = write.Close()
	if err := <-streamed; err != nil {
		t.Errorf("a stream that was under way: %v", err)
	}
	if opened, err := moved.Decrypt(t.Context(), &client.DecryptRequest{Message: message.Bytes()}); err == nil && len(opened.GetPlaintext()) != 100<<10+7 {
		t.Errorf("the stream has %d bytes", len(opened.GetPlaintext()))
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(r.path("kms.sock")); os.IsNotExist(err) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the old socket is still there")
		}
	}
	r.write(strings.Replace(movable(), `socket: kms.sock, mode: "0600"`, `socket: elsewhere.sock, mode: "0660", proofs: [static-peer]`, 1))
	if err := r.reloadAt("admin.sock"); err == nil || !strings.Contains(err.Error(), "listen.native.proofs") {
		t.Errorf("other proofs: %v, want that they take a restart", err)
	}
}
