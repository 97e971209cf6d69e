package agent_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/envelope"
)

// Data keys and key material that callers hold, and messages that they make by
// themselves, outlive the loss of a backend like those of the agent.
func TestExportedOutlivesABackend(t *testing.T) {
	const (
		backend = "  - name: local\n    plugin: local\n    call_timeout: 2s\n    settings: { keystore: keystore, seal: { key_file: keystore.key } }\n"
		key     = `{ name: orders, backend: local, wrapping_key: "local:orders" }`
		alone   = `{ name: orders, backend: second, wrapping_key: "local:archive" }`
		archive = `  - { name: archive, backend: local, wrapping_key: "local:archive" }` + "\n"
		both    = `{ name: orders, backend: local, wrapping_key: "local:orders", more_wraps: [{ backend: second, wrapping_key: "local:archive" }], min_wraps: 2 }`
	)
	second := string(bytes.Replace([]byte(backend), []byte("name: local"), []byte("name: second"), 1))
	r := newRig(t, administrator(backend, backend+second, key, both, archive, ""))
	r.start()
	c := r.as("orders")
	inProcess, err := c.InProcess(client.CacheLimits{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = inProcess.Close() }()
	ctx, pairs := t.Context(), map[string]string{"a": "b"}
	made, err := inProcess.Encrypt(ctx, &client.EncryptRequest{Key: "orders", Plaintext: []byte("hello"), Context: pairs})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := envelope.Parse(made.GetMessage()); err != nil || len(m.EDKs) != 2 {
		t.Errorf("message of %d wraps, %v; want 2", len(m.EDKs), err)
	}
	data, err := c.GenerateDataKey(ctx, &client.GenerateDataKeyRequest{Key: "orders", Context: pairs})
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := c.Wrap(ctx, &client.WrapRequest{Key: "orders", Plaintext: []byte("key material"), Context: pairs})
	if err != nil {
		t.Fatal(err)
	}
	r.write(administrator(backend, second, key, alone, archive, ""))
	r.reload(r.admin())
	fresh, err := c.InProcess(client.CacheLimits{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = fresh.Close() }()
	for name, decrypt := range map[string]func(context.Context, *client.DecryptRequest) (*client.DecryptResponse, error){
		"agent": c.Decrypt, "in process": fresh.Decrypt,
	} {
		opened, err := decrypt(ctx, &client.DecryptRequest{Message: made.GetMessage()})
		if err != nil || string(opened.GetPlaintext()) != "hello" {
			t.Errorf("%s: %v", name, err)
		}
	}
	opened, err := c.DecryptDataKey(ctx, &client.DecryptDataKeyRequest{EncryptedDataKey: data.GetEncryptedDataKey(), Context: pairs})
	if err != nil || !bytes.Equal(opened.GetPlaintext(), data.GetPlaintext()) {
		t.Errorf("DecryptDataKey: %v", err)
	}
	back, err := c.Unwrap(ctx, &client.UnwrapRequest{Wrapped: wrapped.GetWrapped(), Context: pairs})
	if err != nil || string(back.GetPlaintext()) != "key material" {
		t.Errorf("Unwrap: %v", err)
	}
}
