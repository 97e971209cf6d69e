package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/client"
)

// agent is a development agent in a directory of its own.
type agent struct {
	dir, binary string
	process     *exec.Cmd
}

func startAgent(t *testing.T) *agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "rows") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	a := &agent{dir: filepath.Join(dir, "dev"), binary: filepath.Join(dir, "kms-agent")}
	build := exec.Command("go", "build", "-o", a.binary, "./cmd/kms-agent")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	a.start(t)
	t.Cleanup(func() { a.stop(t) })
	return a
}

func (a *agent) start(t *testing.T) {
	t.Helper()
	a.process = exec.Command(a.binary, "dev", "--dir", a.dir)
	if err := a.process.Start(); err != nil {
		t.Fatal(err)
	}
	for range 600 {
		if _, err := os.Stat(filepath.Join(a.dir, "ready")); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("the agent is not ready after 30 s")
}

func (a *agent) stop(t *testing.T) {
	t.Helper()
	if a.process == nil {
		return
	}
	if err := errors.Join(a.process.Process.Signal(syscall.SIGTERM), a.process.Wait()); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
	a.process = nil
}

// command runs a command of the agent's program.
func (a *agent) command(t *testing.T, args ...string) {
	t.Helper()
	c := exec.Command(a.binary, args...)
	c.Env = append(os.Environ(), "KMS_AGENT_ADMIN_SOCKET="+filepath.Join(a.dir, "admin.sock"))
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("kms-agent %v: %v\n%s", args, err, out)
	}
}

// rotate adds a version to the wrapping key of orders.
func (a *agent) rotate(t *testing.T) {
	t.Helper()
	a.command(t, "keys", "local", "rotate", "orders",
		"--keystore", filepath.Join(a.dir, "keystore"), "--key-file", filepath.Join(a.dir, "keystore.key"))
}

// service is the service, at a URL.
type service struct {
	store *Store
	url   string
	db    string
}

func serve(t *testing.T, a *agent, retry time.Duration) *service {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, client.Options{
		Socket: filepath.Join(a.dir, "kms.sock"), Retry: retry,
		WorkloadAPI: "unix://" + filepath.Join(a.dir, "workload-api", "orders.sock"),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	db := filepath.Join(t.TempDir(), "notes.db")
	store, err := OpenStore(ctx, db, c, "orders")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	server := httptest.NewServer(Handler(store))
	t.Cleanup(server.Close)
	return &service{store: store, url: server.URL, db: db}
}

// do makes a request and demands a status.
func (s *service) do(t *testing.T, want int, method, path, body string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = answer.Body.Close() }()
	text, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != want {
		t.Fatalf("%s %s: status %d, %q, %v; want %d", method, path, answer.StatusCode, text, err, want)
	}
	if want == http.StatusServiceUnavailable && answer.Header.Get("Retry-After") == "" {
		t.Errorf("%s %s: no Retry-After", method, path)
	}
	return string(text)
}

// exec changes the database behind the service's back.
func (s *service) exec(t *testing.T, query string, args ...any) {
	t.Helper()
	if _, err := s.store.db.ExecContext(t.Context(), query, args...); err != nil {
		t.Fatal(err)
	}
}

func (s *service) list(t *testing.T, tenant string) (notes []Note) {
	t.Helper()
	if err := json.Unmarshal([]byte(s.do(t, 200, "GET", "/tenants/"+tenant+"/notes", "")), &notes); err != nil {
		t.Fatal(err)
	}
	return notes
}

func TestService(t *testing.T) {
	a := startAgent(t)
	s := serve(t, a, 0)
	s.do(t, 200, "PUT", "/tenants/acme/notes/1", "the first secret")
	s.do(t, 200, "PUT", "/tenants/acme/notes/2", "the second secret")
	s.do(t, 200, "PUT", "/tenants/globex/notes/1", "another secret")

	t.Run("listing", func(t *testing.T) {
		want := []Note{{"1", "the first secret", "1"}, {"2", "the second secret", "1"}}
		if got := s.list(t, "acme"); !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		s.do(t, 404, "GET", "/tenants/acme/notes/3", "")
		s.do(t, 413, "PUT", "/tenants/acme/notes/3", strings.Repeat("x", maxText+1))
	})
	t.Run("nothing is clear on disk", func(t *testing.T) {
		files, err := filepath.Glob(s.db + "*")
		if err != nil || len(files) == 0 {
			t.Fatal(files, err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil || bytes.Contains(data, []byte("secret")) {
				t.Errorf("%s holds a note in clear (%v)", file, err)
			}
		}
	})
	t.Run("wrong tenant", func(t *testing.T) {
		// Somebody with access to the database gives one tenant the row of another.
		s.exec(t, `INSERT INTO notes SELECT 'globex', '9', key_version, body FROM notes WHERE tenant = 'acme' AND id = '1'`)
		s.do(t, 403, "GET", "/tenants/globex/notes/9", "")
		s.do(t, 403, "GET", "/tenants/globex/notes", "")
		s.exec(t, `DELETE FROM notes WHERE tenant = 'globex' AND id = '9'`)
		// Or swaps two rows of one tenant.
		s.exec(t, `UPDATE notes SET body = (SELECT body FROM notes WHERE tenant = 'acme' AND id = '2') WHERE tenant = 'acme' AND id = '1'`)
		s.do(t, 403, "GET", "/tenants/acme/notes/1", "")
		s.do(t, 200, "PUT", "/tenants/acme/notes/1", "the first secret")
	})
	t.Run("rotation", func(t *testing.T) { rotation(t, a, s) })
	t.Run("no agent", func(t *testing.T) {
		impatient := serve(t, a, -1)
		impatient.do(t, 200, "PUT", "/tenants/acme/notes/1", "x")
		a.stop(t)
		impatient.do(t, 503, "GET", "/tenants/acme/notes/1", "")
		// With retries, the service waits for an agent that is restarted.
		done := make(chan []Note, 1)
		go func() { done <- s.list(t, "acme") }()
		a.start(t)
		if got := <-done; len(got) != 52 {
			t.Errorf("over the restart: %d notes, want 52", len(got))
		}
	})
}

func rotation(t *testing.T, a *agent, s *service) {
	for i := range 50 {
		s.do(t, 200, "PUT", fmt.Sprintf("/tenants/acme/notes/many-%d", i), "x")
	}
	a.rotate(t)
	if got := s.list(t, "acme")[0]; got.Text != "the first secret" || got.KeyVersion != "1" {
		t.Errorf("after the rotation: %v, want it to open, under version 1", got)
	}

	// A row that does not open is reported and left alone, and the others move,
	// while somebody writes.
	s.exec(t, `INSERT INTO notes VALUES ('globex', 'bad', '1', (SELECT body FROM notes WHERE tenant = 'acme' AND id = '1'))`)
	var wg sync.WaitGroup
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	wg.Go(func() {
		for ctx.Err() == nil {
			if err := s.store.Put(t.Context(), "acme", "many-7", "edited"); err != nil {
				t.Error(err)
			}
		}
	})
	report, err := s.store.ReEncrypt(t.Context())
	for range 100 { // the agent asks for versions once in a second at most
		if report.Version == "2" || err != nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
		report, err = s.store.ReEncrypt(t.Context())
	}
	stop()
	wg.Wait()
	if err != nil || !slices.Equal(report.Unreadable, []string{"globex/bad"}) || report.Version != "2" || report.Moved < 52 || report.Moved > 53 {
		t.Errorf("re-encryption: %+v, %v; want 52 or 53 rows to version 2, and globex/bad reported", report, err)
	}
	if got := s.do(t, 200, "POST", "/reencrypt", ""); !strings.Contains(got, `"unreadable":["globex/bad"]`) {
		t.Errorf("again: %s, want the row reported again", got)
	}
	s.exec(t, `DELETE FROM notes WHERE id = 'bad'`)
	s.do(t, 200, "POST", "/reencrypt", "") // an edit under the old version may have come behind the first
	if got := s.do(t, 200, "POST", "/reencrypt", ""); !strings.Contains(got, `"moved":0`) {
		t.Errorf("again: %s, want nothing left to move", got)
	}
	s.do(t, 200, "PUT", "/tenants/acme/notes/2", "the second secret, edited")
	for _, note := range slices.Concat(s.list(t, "acme"), s.list(t, "globex")) {
		if note.KeyVersion != "2" {
			t.Errorf("note %v is not under version 2", note)
		}
		if note.ID == "many-7" && note.Text != "edited" {
			t.Errorf("re-encryption undid an edit: %v", note)
		}
	}
	var old int
	err = s.store.db.QueryRowContext(t.Context(), `SELECT count(*) FROM notes WHERE key_version <> '2'`).Scan(&old)
	if err != nil || old != 0 {
		t.Errorf("%d rows are still marked as old (%v)", old, err)
	}
}

// The program as it is started, in the environment of a workload.
func TestRun(t *testing.T) {
	a := startAgent(t)
	t.Setenv("KMS_AGENT_SOCKET", filepath.Join(a.dir, "kms.sock"))
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+filepath.Join(a.dir, "workload-api", "orders.sock"))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{url: "http://" + listener.Addr().String()}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx, listener, filepath.Join(t.TempDir(), "notes.db"), "orders") }()
	s.do(t, 200, "PUT", "/tenants/acme/notes/1", "the first secret")
	if got := s.do(t, 200, "GET", "/tenants/acme/notes/1", ""); got != `{"id":"1","text":"the first secret","key_version":"1"}`+"\n" {
		t.Errorf("got %s", got)
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
}

// A database that is none.
func TestOpenStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notes.db")
	if err := os.WriteFile(path, bytes.Repeat([]byte("no database "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := OpenStore(t.Context(), path, nil, "orders"); err == nil || s != nil {
		t.Errorf("got %v, %v", s, err)
	}
	if _, err := sql.Open("sqlite", ""); err != nil {
		t.Errorf("the driver: %v", err)
	}
}
