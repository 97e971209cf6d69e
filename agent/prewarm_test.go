package agent_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// What prewarm names is there when the backend goes away right after the start, also
// what nobody has asked for; other messages are not. It is on record.
func TestPrewarm(t *testing.T) {
	plain := strings.Replace(configText(), "static_peers: []", "static_peers: ["+staticPeer()+"]", 1)
	r := newRig(t, plain)
	r.start()
	c := r.as("peer")
	message := func(name string) []byte {
		t.Helper()
		m, err := c.Encrypt(t.Context(), &client.EncryptRequest{Key: "orders", Plaintext: []byte(name), Context: map[string]string{"name": name}})
		if err != nil {
			t.Fatal(err)
		}
		return m.GetMessage()
	}
	first := message("first")
	conn := r.plain()
	exported, err := kmsagentv1.NewKMSClient(conn).GenerateDataKey(t.Context(), &kmsagentv1.GenerateDataKeyRequest{Key: "orders", Context: map[string]string{"a": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	r.stop()
	r.start() // another data key for the second message
	c = r.as("peer")
	second := message("second")
	r.stop()

	edk, err := protojson.Marshal(exported.GetEncryptedDataKey())
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"held-1.enc": first, "held-2.enc": first[:len(first)-3], // the header is enough
		"list.jsonl": fmt.Appendf(nil, "\n{\"encrypted_data_key\": %s, \"context\": {\"a\": \"b\"}}\n", edk),
	} {
		if err := os.WriteFile(r.path(name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.write(strings.Replace(plain, `wrapping_key: "local:orders" }`,
		`wrapping_key: "local:orders", cache: { max_age: 2s }, grace: { decrypt: 1h }, prewarm: ["held-*.enc", "list.jsonl"] }`, 1))
	r.start()
	r.await("the data keys are held", func(s *adminv1.StatusResponse) bool {
		for _, k := range s.GetKeys() {
			if k.GetName() == "orders" && k.GetHeld() == 3 && k.GetHeldWanted() == 3 {
				return true
			}
		}
		return false
	})
	if log := r.auditText(); !strings.Contains(log, `"operation":"prewarm"`) || !strings.Contains(log, "3 data keys are held ready") {
		t.Errorf("the audit log has no record of it:\n%s", log)
	}
	if err := os.Rename(r.path("keystore"), r.path("away")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second) // longer than max_age: what follows is in grace
	c = r.as("peer")
	got, err := c.Decrypt(t.Context(), &client.DecryptRequest{Message: first})
	if err != nil || string(got.GetPlaintext()) != "first" || got.GetKeyUse().GetFreshness().GetSource() != kmsagentv1.Freshness_SOURCE_GRACE {
		t.Errorf("a held message: %v, %v, want it in grace", got.GetKeyUse(), err)
	}
	opened, err := kmsagentv1.NewKMSClient(r.plain()).DecryptDataKey(t.Context(), &kmsagentv1.DecryptDataKeyRequest{
		EncryptedDataKey: exported.GetEncryptedDataKey(), Context: map[string]string{"a": "b"},
	})
	if err != nil || string(opened.GetPlaintext()) != string(exported.GetPlaintext()) {
		t.Errorf("a held data key: %v", err)
	}
	_, err = c.Decrypt(t.Context(), &client.DecryptRequest{Message: second})
	wantReason(t, err, "BACKEND_UNAVAILABLE")
}

// Files that are not there, or not what they should be, are told; the rest is held.
func TestPrewarmFaults(t *testing.T) {
	plain := strings.Replace(configText(), "static_peers: []", "static_peers: ["+staticPeer()+"]", 1)
	r := newRig(t, plain)
	r.start()
	m, err := r.as("peer").Encrypt(t.Context(), &client.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	r.stop()
	for name, content := range map[string][]byte{"good.enc": m.GetMessage(), "bad.enc": []byte("no message"), "bad.jsonl": []byte("{}\n")} {
		if err := os.WriteFile(r.path(name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.write(strings.Replace(plain, `wrapping_key: "local:orders" }`,
		`wrapping_key: "local:orders", prewarm: ["*.enc", "bad.jsonl", "missing.enc", "state"] }`, 1))
	r.start()
	s := r.await("the good one is held", func(s *adminv1.StatusResponse) bool {
		return len(s.GetKeys()) > 0 && heldKeys(s, "orders") == 1
	})
	if len(s.GetProblems()) != 0 {
		t.Errorf("problems: %v", s.GetProblems())
	}
	// What appears later is found.
	r.write(strings.Replace(plain, `wrapping_key: "local:orders" }`,
		`wrapping_key: "local:orders", cache: { max_age: 2s }, prewarm: ["*.enc"] }`, 1))
	if err := os.Remove(r.path("bad.enc")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(r.path("another.enc"), m.GetMessage(), 0o600); err != nil {
		t.Fatal(err)
	}
	r.stop()
	r.start()
	r.await("both are held", func(s *adminv1.StatusResponse) bool { return heldKeys(s, "orders") == 2 })
}

func heldKeys(s *adminv1.StatusResponse, key string) int {
	for _, k := range s.GetKeys() {
		if k.GetName() == key {
			return int(k.GetHeld())
		}
	}
	return -1
}
