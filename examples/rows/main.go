// Rows is a small service that keeps notes of tenants in a SQLite database, each
// encrypted by the kms-agent of its host.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/kms-agent/kms-agent/client"
)

// What a request may take.
const (
	maxText     = 64 << 10
	requestTime = 10 * time.Second
)

func main() {
	address := flag.String("listen", "127.0.0.1:8080", "address to serve on")
	path := flag.String("db", "notes.db", "file of the database")
	key := flag.String("key", "orders", "key of the agent")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", *address)
	if err == nil {
		err = run(ctx, listener, *path, *key)
	}
	if err != nil {
		stop()
		log.Fatal(err) //nolint:gocritic // stop was called
	}
}

// run serves until ctx ends, and closes the listener. Where the agent is, and who this process is, the
// environment says: KMS_AGENT_SOCKET and SPIFFE_ENDPOINT_SOCKET.
func run(ctx context.Context, listener net.Listener, path, key string) error {
	defer func() { _ = listener.Close() }()
	agent, err := client.Dial(ctx, client.FromEnvironment())
	if err != nil {
		return err
	}
	defer func() { _ = agent.Close() }()
	store, err := OpenStore(ctx, path, agent, key)
	if err != nil {
		return err
	}
	defer func() { _ = store.Close() }()
	server := &http.Server{Handler: Handler(store), ReadHeaderTimeout: requestTime}
	ended := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer ended()
	log.Printf("serving on http://%s", listener.Addr())
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Handler serves a store. In a real service the tenant would come from the
// caller's session, not from the path.
func Handler(s *Store) http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, do func(context.Context, http.ResponseWriter, *http.Request) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), requestTime)
			defer cancel()
			if err := do(ctx, w, r); err != nil {
				refuse(w, err)
			}
		})
	}
	handle("PUT /tenants/{tenant}/notes/{id}", func(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
		text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxText))
		if err != nil {
			return err
		}
		return s.Put(ctx, r.PathValue("tenant"), r.PathValue("id"), string(text))
	})
	handle("GET /tenants/{tenant}/notes/{id}", func(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
		note, err := s.Get(ctx, r.PathValue("tenant"), r.PathValue("id"))
		if err != nil {
			return err
		}
		return reply(w, note)
	})
	handle("GET /tenants/{tenant}/notes", func(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
		notes, err := s.List(ctx, r.PathValue("tenant"))
		if err != nil {
			return err
		}
		return reply(w, notes)
	})
	handle("POST /reencrypt", func(ctx context.Context, w http.ResponseWriter, _ *http.Request) error {
		report, err := s.ReEncrypt(ctx)
		if err != nil {
			return err
		}
		return reply(w, report)
	})
	return mux
}

func reply(w http.ResponseWriter, answer any) error {
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(answer)
}

// refuse answers an error. What the agent said goes to the log: its request ID
// leads to the agent's audit record.
func refuse(w http.ResponseWriter, err error) {
	log.Print(err)
	var failed *client.Error
	var tooLong *http.MaxBytesError
	switch {
	case errors.Is(err, ErrNotFound):
		http.Error(w, "no such note", http.StatusNotFound)
	case errors.As(err, &tooLong):
		http.Error(w, fmt.Sprintf("a note has %d bytes at most", maxText), http.StatusRequestEntityTooLarge)
	case errors.Is(err, client.ErrDecryptFailed), errors.Is(err, client.ErrAccessDenied):
		http.Error(w, "not this tenant's to read", http.StatusForbidden)
	case errors.As(err, &failed) && failed.Retryable():
		seconds := max(math.Ceil(failed.RetryAfter.Seconds()), 1)
		w.Header().Set("Retry-After", strconv.Itoa(int(seconds)))
		http.Error(w, "not now", http.StatusServiceUnavailable)
	default:
		http.Error(w, "internal error", http.StatusInternalServerError)
	}
}
