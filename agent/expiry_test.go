package agent_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// with connects with one SVID and never another.
func (r *rig) with(svid *x509svid.SVID) *grpc.ClientConn {
	r.t.Helper()
	conn, err := grpc.NewClient("unix:"+r.path("kms.sock"), grpc.WithTransportCredentials(
		grpccredentials.MTLSClientCredentials(svid, r.bundles(), tlsconfig.AuthorizeAny())))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (r *rig) bundles() *workloadapi.BundleSource {
	r.t.Helper()
	source, err := workloadapi.NewBundleSource(r.t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+r.path("api/orders.sock"))))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = source.Close() })
	return source
}

// trickle sends a part now and then until the stream ends, and returns its end; nil
// where it goes on after 20 s.
func trickle[In, Out any](stream grpc.BidiStreamingClient[In, Out], parts func() *In) error {
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := stream.Recv(); err != nil {
				ended <- err
				return
			}
		}
	}()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(20 * time.Second); ; {
		select {
		case err := <-ended:
			return err
		case <-deadline:
			return nil
		case <-tick.C:
			_ = stream.Send(parts()) // its error is Recv's
		}
	}
}

// Nothing of a connection outlives the SVID that it was made with: no call, and no
// stream that is open; and a stream that is cut off does not look whole.
func TestNothingOutlivesItsSVID(t *testing.T) {
	t.Parallel()
	r := newRigWithSVIDs(t, configText(), 3*time.Second)
	r.start()
	orders := r.as("orders")
	var message strings.Builder
	if _, err := orders.EncryptStream(t.Context(), &kmsagentv1.EncryptStreamStart{Key: "orders"}, strings.NewReader(strings.Repeat("x", 2<<20)), &message); err != nil {
		t.Fatal(err)
	}
	svid, err := workloadapi.FetchX509SVID(t.Context(), workloadapi.WithAddr("unix://"+r.path("api/orders.sock")))
	if err != nil {
		t.Fatal(err)
	}
	expires := svid.Certificates[0].NotAfter
	conn := r.with(svid)
	c := kmsagentv1.NewKMSClient(conn)
	if _, err := c.WhoAmI(t.Context(), &kmsagentv1.WhoAmIRequest{}); err != nil {
		t.Fatalf("before it expires: %v", err)
	}
	ends := make(chan error, 2)
	encrypt, err := c.EncryptStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		first := &kmsagentv1.EncryptStreamRequest{Part: &kmsagentv1.EncryptStreamRequest_Start{Start: &kmsagentv1.EncryptStreamStart{Key: "orders"}}}
		ends <- trickle(encrypt, func() *kmsagentv1.EncryptStreamRequest {
			defer func() {
				first = &kmsagentv1.EncryptStreamRequest{Part: &kmsagentv1.EncryptStreamRequest_Chunk{Chunk: make([]byte, 1000)}}
			}()
			return first
		})
	}()
	decrypt, err := c.DecryptStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		first, rest := &kmsagentv1.DecryptStreamRequest{Part: &kmsagentv1.DecryptStreamRequest_Start{Start: &kmsagentv1.DecryptStreamStart{}}}, message.String()
		ends <- trickle(decrypt, func() *kmsagentv1.DecryptStreamRequest {
			part := first
			first = &kmsagentv1.DecryptStreamRequest{Part: &kmsagentv1.DecryptStreamRequest_Chunk{Chunk: []byte(rest[:5000])}}
			rest = rest[5000:]
			return part
		})
	}()
	for range 2 {
		err := <-ends
		if err == nil || errors.Is(err, io.EOF) {
			t.Errorf("a stream on the connection ended with %v, want an error: it was cut off", err)
		}
		if early := time.Until(expires); early > 0 {
			t.Errorf("a stream ended %v before its SVID: %v", early, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := c.WhoAmI(ctx, &kmsagentv1.WhoAmIRequest{}); err == nil {
		t.Error("a call on the connection is served after its SVID expired")
	}
	if who, err := r.as("orders").WhoAmI(t.Context()); err != nil || who.GetProof() != "x509-svid" {
		t.Errorf("with its successor: %v, %v", who, err)
	}
	r.stop()
	if cut := strings.Count(r.auditText(), `"outcome":"error","reason":"CANCELLED"`); cut != 2 {
		t.Errorf("%d streams are on record as cut off, want 2:\n%s", cut, r.auditText())
	}
}
