package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// Whoever mistypes a key's name is told the names that there are, and not to make a key.
func TestMistypedKey(t *testing.T) {
	r := newRig(t)
	commands := []string{"destroy", "disable", "enable", "rotate"}
	for _, command := range commands {
		a := r.administer(request{Command: command, Key: "order", Version: 1})
		want := "nor any other of kms-agent"
		if command == "rotate" {
			want = "create it with 'kms-agent hsm init-key'"
		}
		if a.Class != "key not found" || !strings.Contains(a.Error, want) {
			t.Errorf("%s on a token without keys: %+v, want %q", command, a, want)
		}
	}
	r.must(request{Command: "init-key", Key: "orders"})
	r.must(request{Command: "init-key", Key: "other"})
	for _, command := range commands {
		a := r.administer(request{Command: command, Key: "order", Version: 1})
		if a.Class != "key not found" || !strings.Contains(a.Error, "the token has no key order; its keys are orders, other") ||
			strings.Contains(a.Error, "init-key") != (command == "rotate") {
			t.Errorf("%s: %+v", command, a)
		}
	}
	var many []*hsm.Key
	for i := range maxNamed + 2 {
		many = append(many, &hsm.Key{Name: fmt.Sprintf("k%d", i)})
	}
	if got := named(many); !strings.HasSuffix(got, ", k9 and 2 more") {
		t.Errorf("of many keys: %q", got)
	}
}

// The list says of a version whose key somebody has deleted, or made anew, that it is
// not what its state says.
func TestListOfWhatIsGone(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	r.must(request{Command: "rotate", Key: "orders"})
	id := r.must(request{Command: "rotate", Key: "orders"}).Keys[0].Versions[1].ID
	r.must(request{Command: "disable", Key: "orders", Version: 1})
	problems := func() (found []string) {
		for _, v := range r.must(request{Command: "list"}).Keys[0].Versions {
			found = append(found, v.Problem)
		}
		return found
	}
	if got := strings.Join(problems(), ""); got != "" {
		t.Errorf("of keys that are well: %q", got)
	}
	r.Tool("--delete-object", "--type", "secrkey", "--id", id)
	if got := problems(); got[0]+got[2] != "" || !strings.Contains(got[1], "has no key with the ID "+id) {
		t.Errorf("of a key that is gone: %q", got)
	}
	r.Tool("--keygen", "--key-type", "AES:32", "--id", id, "--label", "other", "--private", "--sensitive")
	if got := problems(); got[0]+got[2] != "" || !strings.Contains(got[1], "is not the one") {
		t.Errorf("of another key: %q", got)
	}
	for _, q := range []request{
		{Command: "rotate"}, {Command: "enable", Version: 1}, {Command: "disable", Version: 1}, {Command: "destroy", Version: 1},
	} {
		q.Key = "orders"
		versions := r.must(q).Keys[0].Versions
		if versions[0].Problem != "" || !strings.Contains(versions[1].Problem, "is not the one") || versions[2].Problem != "" {
			t.Errorf("after %s: %+v", q.Command, versions)
		}
	}
}

// A change that is made is told, where the token fails after it, too.
func TestChangeBeforeAnOutage(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	r.must(request{Command: "rotate", Key: "orders"})
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	r.settings["module"] = fault.Module
	fault.Set("C_Decrypt rv=0x30") // CKR_DEVICE_ERROR
	a, said := r.ask(request{Command: "disable", Key: "orders", Version: 1})
	if a.Error != "" || a.Keys[0].Versions[0].State != hsm.Disabled.String() || !bytes.Contains(said, []byte("warning: what may be wrong")) {
		t.Errorf("%+v\n%s", a, said)
	}
}

// What an outage leaves unknown of a version is no fault of the version.
func TestListInAnOutage(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	r.settings["module"] = fault.Module
	fault.Set("C_Decrypt rv=0x30") // CKR_DEVICE_ERROR
	if a := r.administer(request{Command: "list"}); a.Class != "unavailable" || len(a.Keys) != 0 || !strings.Contains(a.Error, "CKR_DEVICE_ERROR") {
		t.Errorf("%+v", a)
	}
	fault.Set()
	if a := r.must(request{Command: "list"}); a.Keys[0].Versions[0].Problem != "" {
		t.Errorf("%+v", a)
	}
}

func TestWhatIsOfAVersion(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	worn := &hsm.Error{Kind: hsm.KeyUnusable, Detail: "it is worn"}
	for _, c := range []struct {
		ctx  context.Context //nolint:containedctx // a case
		err  error
		want bool
	}{
		{t.Context(), worn, true},
		{t.Context(), fmt.Errorf("look: %w", &hsm.Error{Kind: hsm.KeyNotFound}), true},
		{t.Context(), &hsm.Error{Kind: hsm.Broken}, true},
		{t.Context(), &hsm.Error{Kind: hsm.Unavailable}, false},
		{t.Context(), &hsm.Error{Kind: hsm.Unauthenticated}, false},
		{t.Context(), &hsm.Error{Kind: hsm.Broken, Err: context.DeadlineExceeded}, false},
		{t.Context(), errors.New("CKR_SESSION_HANDLE_INVALID"), false},
		{over, worn, false},
	} {
		if got := ofVersion(c.ctx, c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}
