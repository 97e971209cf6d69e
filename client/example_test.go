package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/client"
)

// Encrypt something for a tenant, and decrypt it again. The environment of a
// process says where its agent is (KMS_AGENT_SOCKET) and who gives it its
// identity (SPIFFE_ENDPOINT_SOCKET).
func Example() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, client.FromEnvironment())
	if err != nil {
		log.Panic(err)
	}
	defer func() { _ = c.Close() }()

	tenant := map[string]string{"tenant": "acme"} // authenticated, and readable in the message
	sealed, err := c.Encrypt(ctx, &client.EncryptRequest{Key: "orders", Plaintext: []byte("4 apples"), Context: tenant})
	if err != nil {
		log.Panic(err)
	}
	opened, err := c.Decrypt(ctx, &client.DecryptRequest{Message: sealed.GetMessage(), ExpectedContext: tenant})
	if err != nil {
		log.Panic(err)
	}
	fmt.Printf("%s, under %s\n", opened.GetPlaintext(), opened.GetKeyUse().GetKey())
	// Output: 4 apples, under orders
}

// Take only one agent for the agent, and wait no longer than a second for it.
func ExampleDial() {
	ctx := context.Background()
	o := client.FromEnvironment()
	o.AgentID = spiffeid.MatchID(spiffeid.RequireFromString("spiffe://dev.kms-agent.internal/kms-agent"))
	o.Retry = time.Second
	c, err := client.Dial(ctx, o)
	if err != nil {
		log.Panic(err)
	}
	defer func() { _ = c.Close() }()

	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	who, err := c.WhoAmI(ctx)
	if err != nil {
		log.Panic(err)
	}
	fmt.Println(who.GetSpiffeId(), who.GetProof())
	// Output: spiffe://dev.kms-agent.internal/workload/orders x509-svid
}

// What went wrong, and what to do about it.
func ExampleError() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, client.FromEnvironment())
	if err != nil {
		log.Panic(err)
	}
	defer func() { _ = c.Close() }()

	_, err = c.Encrypt(ctx, &client.EncryptRequest{Key: "payroll", Plaintext: []byte("x")})
	var failed *client.Error
	switch {
	case errors.Is(err, client.ErrAccessDenied):
		fmt.Println("not ours to use")
	case errors.Is(err, client.ErrUnreachable):
		fmt.Println("no agent")
	case errors.As(err, &failed) && failed.Retryable():
		fmt.Println("later, perhaps in", failed.RetryAfter)
	}
	// Output: not ours to use
}

// Many small messages: with data keys at hand, most need no call at all.
func ExampleClient_InProcess() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, client.FromEnvironment())
	if err != nil {
		log.Panic(err)
	}
	defer func() { _ = c.Close() }()
	p, err := c.InProcess(client.CacheLimits{MaxEntries: 100, MaxAge: time.Minute})
	if err != nil {
		log.Panic(err)
	}
	defer func() { _ = p.Close() }() // clears the data keys

	var message []byte
	for i := range 1000 {
		sealed, err := p.Encrypt(ctx, &client.EncryptRequest{Key: "orders", Plaintext: fmt.Appendf(nil, "order %d", i)})
		if err != nil {
			log.Panic(err)
		}
		message = sealed.GetMessage()
	}
	// The agent opens it too.
	opened, err := c.Decrypt(ctx, &client.DecryptRequest{Message: message})
	if err != nil {
		log.Panic(err)
	}
	fmt.Printf("%s; 1000 messages, %d call for a data key\n", opened.GetPlaintext(), p.EncryptionStats().Misses)
	// Output: order 999; 1000 messages, 1 call for a data key
}

// Data of any length, from a reader to a writer.
func ExampleClient_EncryptStream() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, client.FromEnvironment())
	if err != nil {
		log.Panic(err)
	}
	defer func() { _ = c.Close() }()

	var message, plaintext bytes.Buffer
	if _, err := c.EncryptStream(ctx, &client.EncryptStreamStart{Key: "orders"}, strings.NewReader(strings.Repeat("tick ", 100_000)), &message); err != nil {
		log.Panic(err)
	}
	if _, err := c.DecryptStream(ctx, &client.DecryptStreamStart{}, &message, &plaintext); err != nil {
		log.Panic(err) // and throw away what is in plaintext
	}
	fmt.Println(plaintext.Len(), "bytes")
	// Output: 500000 bytes
}

// For code that writes: only Close makes the message whole, and Abort leaves
// none.
func ExampleClient_NewEncryptWriter() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, client.FromEnvironment())
	if err != nil {
		log.Panic(err)
	}
	defer func() { _ = c.Close() }()

	var message bytes.Buffer
	report := func() error {
		w := c.NewEncryptWriter(ctx, &client.EncryptStreamStart{Key: "orders"}, &message)
		defer w.Abort() // does nothing after Close
		for i := range 3 {
			if _, err := fmt.Fprintln(w, "line", i); err != nil {
				return err
			}
		}
		return w.Close()
	}
	if err := report(); err != nil {
		log.Panic(err)
	}

	r, err := c.NewDecryptReader(ctx, &client.DecryptStreamStart{}, &message)
	if err != nil {
		log.Panic(err)
	}
	text, err := io.ReadAll(r) // an error means that text is not the whole
	if err := errors.Join(err, r.Close()); err != nil {
		log.Panic(err)
	}
	fmt.Print(string(text))
	// Output:
	// line 0
	// line 1
	// line 2
}

// How fresh must the key be, and how fresh was it?
func ExampleFreshnessOf() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, client.FromEnvironment())
	if err != nil {
		log.Panic(err)
	}
	defer func() { _ = c.Close() }()

	sealed, err := c.Encrypt(ctx, &client.EncryptRequest{
		Key: "orders", Plaintext: []byte("x"), MaxStale: client.MaxStale(0), // ask upstream, now
	})
	if err != nil {
		log.Panic(err)
	}
	switch f := client.FreshnessOf(sealed.GetKeyUse()); f.Source {
	case client.SourceUpstream:
		fmt.Println("confirmed upstream just now")
	case client.SourceGrace:
		fmt.Println("upstream is away; this works for another", f.GraceLeft)
	default:
		fmt.Println("confirmed upstream", f.Age, "ago")
	}
	// Output: confirmed upstream just now
}
