package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/plugins"
)

// talkative is a library before SoftHSM that prints, or that never comes back.
const talkative = `
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
unsigned long C_GetFunctionList(void **list) {
	if (getenv("VENDOR_HANGS")) for (;;) pause();
	puts("Vendor client 1.0, (c) Vendor");
	fflush(stdout);
	void *real = dlopen("%s", RTLD_NOW);
	if (!real) return 5;
	return ((unsigned long (*)(void **))dlsym(real, "C_GetFunctionList"))(list);
}
`

func newTalkative(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	dir := t.TempDir()
	source, module := filepath.Join(dir, "vendor.c"), filepath.Join(dir, "vendor.so")
	if err := os.WriteFile(source, fmt.Appendf(nil, talkative, hsmtest.SoftHSMModule), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cc", "-shared", "-fPIC", "-o", module, source, "-ldl").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r.settings["module"] = module
	return r
}

func TestLibraryThatPrints(t *testing.T) {
	r := newTalkative(t)
	r.must(request{Command: "init-key", Key: "orders"})
	if keys := r.must(request{Command: "list"}).Keys; len(keys) != 1 {
		t.Errorf("%d keys, want 1", len(keys))
	}
}

func TestLibraryThatDoesNotLoad(t *testing.T) {
	r := newTalkative(t)
	t.Setenv("VENDOR_HANGS", "1")
	r.settings["hang_after"] = "300ms"
	a := r.administer(request{Command: "list"})
	if a.Class != "unavailable" || !strings.Contains(a.Error, "being loaded") {
		t.Errorf("%+v", a)
	}
}

// A token that is not the one wanted is told at once, without the kinds' names.
func TestTokenThatIsNotThere(t *testing.T) {
	r := newRig(t)
	r.settings["token"] = "pkcs11:token=other"
	began := time.Now()
	a := r.administer(request{Command: "list"})
	if a.Class != "unavailable" || !strings.HasPrefix(a.Error, "no token matches") || strings.Contains(a.Error, "SOFTHSM2_CONF") {
		t.Errorf("%+v", a)
	}
	if took := time.Since(began); took > adminPatience {
		t.Errorf("it took %v", took)
	}
}

// Where no token is there at all, the library looks for them elsewhere: by its own
// configuration.
func TestNoTokenAtAll(t *testing.T) {
	r := newRig(t)
	if err := errors.Join(os.RemoveAll(r.Tokens()), os.Mkdir(r.Tokens(), 0o700)); err != nil {
		t.Fatal(err)
	}
	a := r.administer(request{Command: "list"})
	for _, part := range []string{"no token matches", "is not initialised", "SOFTHSM2_CONF", "env of its backend"} {
		if !strings.Contains(a.Error, part) {
			t.Errorf("%+v has no %q", a, part)
		}
	}
	a = r.administer(request{Command: "list", ByFlags: true})
	if !strings.Contains(a.Error, "environment of this command? As by export SOFTHSM2_CONF=") || strings.Contains(a.Error, "its backend") {
		t.Errorf("without a backend: %+v", a)
	}
	for _, detail := range []string{"the module shows no token: is it reachable?", "initialise the module: C_Initialize: CKR_GENERAL_ERROR"} {
		if got := classified(&hsm.Error{Kind: hsm.Unavailable, Detail: detail}).Error(); strings.Count(got, "SOFTHSM2_CONF") != 1 {
			t.Errorf("in the agent's log: %q", got)
		}
	}
}

// A module that is none is told in the words of check, with the cure.
func TestModuleThatIsNone(t *testing.T) {
	r := newRig(t)
	r.Write("notes", "no library")
	for module, want := range map[string]string{
		"/usr/lib/missing.so": "settings.module: /usr/lib/missing.so does not exist; name the vendor's PKCS#11 library",
		r.Path("notes"):       "settings.module: " + r.Path("notes") + " is no shared library",
	} {
		r.settings["module"] = module
		if a := r.administer(request{Command: "probe"}); a.Error != want || a.Class != "invalid" {
			t.Errorf("%+v, want %q, invalid", a, want)
		}
	}
}

func TestClasses(t *testing.T) {
	r := newRig(t)
	for want, q := range map[string]request{
		"key not found": {Command: "rotate", Key: "missing"},
		"invalid":       {Command: "init-key", Key: "orders", Suite: "rot13"},
	} {
		if a := r.administer(q); a.Class != want || strings.HasPrefix(a.Error, want) {
			t.Errorf("%s: %+v, want class %q", q.Command, a, want)
		}
	}
	r.Write("pin", "not the PIN\n")
	if a := r.administer(request{Command: "list"}); a.Class != "unauthenticated" {
		t.Errorf("wrong PIN: %+v", a)
	}
}

func TestDisableOfTheCurrentVersion(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	a := r.administer(request{Command: "disable", Key: "orders", Version: 1})
	if a.Class != "unconfirmed" || !strings.Contains(a.Error, "--confirm orders@1") || !strings.Contains(a.Error, "rotate orders") {
		t.Errorf("%+v", a)
	}
	if state := r.must(request{Command: "list"}).Keys[0].Versions[0].State; state != hsm.Enabled.String() {
		t.Errorf("the version is %s", state)
	}
	r.must(request{Command: "disable", Key: "orders", Version: 1, Confirmed: true})
}

// The table of settings has the bounds that a setting out of them is refused with.
func TestBoundsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/hsm.md")
	if err != nil {
		t.Fatal(err)
	}
	for setting, c := range map[string]struct{ value, standard string }{
		"sessions": {"1025", "; 8,"}, "hang_after": {`"1h"`, "`10s`"}, "fleet_size": {"0", "`1`"},
	} {
		_, _, err := parseSettings(json.RawMessage(`{"` + setting + `": ` + c.value + `}`))
		if err == nil {
			t.Fatalf("%s = %s is taken", setting, c.value)
		}
		bounds := regexp.MustCompile(`settings\.` + setting + `: (\w+ to \w+)`).FindStringSubmatch(err.Error())
		row := regexp.MustCompile("(?m)^\\| `" + setting + "` \\| .*$").FindString(string(page))
		if bounds == nil || !strings.Contains(row, bounds[1]) || !strings.Contains(row, c.standard) {
			t.Errorf("%v\nthe row %q\nwants %q and %q", err, row, bounds, c.standard)
		}
	}
}

// Who may remove the ledger of logins has a wrong PIN tried until the token is locked.
func TestStateDirectoryOfOthers(t *testing.T) {
	r := newRig(t)
	if err := os.Chmod(r.state(), 0o770); err != nil {
		t.Fatal(err)
	}
	a := r.administer(request{Command: "list"})
	if a.Class != "invalid" || !strings.Contains(a.Error, "chmod 700") {
		t.Errorf("%+v", a)
	}
}

// A probe says what the suites use of the token, and why new keys get theirs.
func TestProbeSaysWhy(t *testing.T) {
	p := newRig(t).must(request{Command: "probe"}).Probe
	if p.Use != "aes-gcm" || !strings.Contains(p.Why, "one operation") || p.Firmware == "" || p.Serial == "" {
		t.Errorf("%+v", p)
	}
	for _, s := range p.Suites {
		if len(s.Mechanisms) == 0 || s.Works == (s.Reason != "") {
			t.Errorf("%+v", s)
		}
	}
}

func TestAdministerIsHardened(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), administerVariable+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		if err == nil && !bytes.Contains(b, []byte("NoNewPrivs:\t1")) {
			err = errors.New("new privileges are possible")
		}
		return err
	})
	_ = in.Close()
	_ = cmd.Wait() // it was asked nothing
}

func TestSettingsFaultsAreToldTogether(t *testing.T) {
	for raw, want := range map[string][]string{
		`{"hang_after": 5}`:                           {`settings.hang_after: a duration in quotes, such as "10s"`, "settings.module"},
		`{"hang_after": "soon"}`:                      {`settings.hang_after: a duration in quotes, such as "10s"`},
		`{"hang_after": "1ms"}`:                       {"settings.hang_after: 100ms to 10m"},
		`{"token": "pkcs11:object=orders"}`:           {"settings.token: pkcs11:object=orders selects the token"},
		`{"token": "kms"}`:                            {`settings.token: "kms" is no PKCS#11 URI, such as pkcs11:token=kms`},
		`{"token": "pkcs11:"}`:                        {"settings.token: pkcs11: selects any token"},
		`{"pin_file": "pin", "pin_variable": "P"}`:    {"settings.pin_file: exactly one", "settings.pin_file: must be an absolute path"},
		`{"pinfile": "pin"}`:                          {"settings.pinfile: there is no such setting"},
		`{"sessions": "many"}`:                        {"settings.sessions: must be of type int, not string"},
		``:                                            {"settings: are missing"},
		`{"fleet_size": 1000001, "hang_after": "5s"}`: {"settings.fleet_size: 1 to 1000000"},
		`{"fleet_size": 0}`:                           {"settings.fleet_size: 1 to 1000000"},
	} {
		_, _, err := parseSettings(json.RawMessage(raw))
		for _, part := range want {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %v\nwant %s", raw, err, part)
			}
		}
	}
}

func TestToldHasNoKinds(t *testing.T) {
	inner := &hsm.Error{Kind: hsm.Invalid, Detail: "2 tokens match"}
	err := fmt.Errorf("look: %w", &hsm.Error{Kind: hsm.Unavailable, Detail: "the token is not attached", Err: inner})
	if got, want := told(err), "look: the token is not attached: 2 tokens match"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	tried := errors.Join(fmt.Errorf("aes-kwp: %w", &hsm.Error{Kind: hsm.Broken, Detail: "refused"}), fmt.Errorf("aes-gcm: %w", inner))
	if got, want := told(&hsm.Error{Kind: hsm.Broken, Detail: "none works", Err: tried}), "none works: aes-kwp: refused\naes-gcm: 2 tokens match"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := classified(inner).Error(), "Invalid: 2 tokens match"; got != want {
		t.Errorf("in the agent's log: %q, want %q", got, want)
	}
}

// What keys are made and tested with counts as their wraps, beside those of an agent.
func TestWrapsOfAdministration(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	path := filepath.Join(r.state(), "wraps.json")
	content, err := os.ReadFile(path)
	var counts struct{ Wraps map[string]int }
	if err = errors.Join(err, json.Unmarshal(content, &counts)); err != nil {
		t.Fatal(err)
	}
	listed := r.must(request{Command: "list"}).Keys[0].Versions[0]
	id := listed.ID
	if n := counts.Wraps[id]; n < 3 || n > 10 {
		t.Errorf("%d wraps are counted of %s, want its canary and its test: %s", n, id, content)
	}
	if w := listed.Wraps; w == nil || w.Used < uint64(counts.Wraps[id]) || w.Used > 20 || w.Limit != 1<<32 {
		t.Errorf("listed are %+v, want a few more than %d of 2^32", w, counts.Wraps[id])
	}
	r.Write("state/wraps.json", "{")
	a, said := r.ask(request{Command: "rotate", Key: "orders"})
	first, _, _ := bytes.Cut(said, []byte("\n")) // the operator sees lines that begin so
	if a.Error != "" || !bytes.HasPrefix(first, []byte("warning: ")) || !bytes.Contains(first, []byte("remove the file")) {
		t.Errorf("with damaged counts, whose cure it is: %+v\n%s", a, said)
	}
	if a := r.administer(request{Command: "list"}); a.Error != "" || a.Keys[0].Current != 2 {
		t.Errorf("with damaged counts: %+v", a)
	}
}

func TestProbeOfRandom(t *testing.T) {
	r := newRig(t)
	if p := r.must(request{Command: "probe"}).Probe; !p.Random.Works || p.Random.Reason != "" {
		t.Errorf("random: %+v", p.Random)
	}
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	fault.Set("C_GenerateRandom rv=0x121") // CKR_RANDOM_NO_RNG
	r.settings["module"] = fault.Module
	if p := r.must(request{Command: "probe"}).Probe; p.Random.Works || !strings.Contains(p.Random.Reason, "no random number generator") {
		t.Errorf("random: %+v", p.Random)
	}
}

// Commands of one host that change a key at once follow one upon the other: none fails,
// and each has made its version.
func TestCommandsAtOnce(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	for range 3 {
		var commands sync.WaitGroup
		for range 4 {
			commands.Go(func() {
				if a := r.administer(request{Command: "rotate", Key: "orders"}); a.Error != "" {
					t.Errorf("rotate: %s", a.Error)
				}
			})
		}
		commands.Wait()
	}
	if k := r.must(request{Command: "list"}).Keys; len(k) != 1 || k[0].Current != 13 || len(k[0].Versions) != 13 {
		t.Errorf("list: %+v, want 13 versions", k)
	}
}

// data writes an object into the token, as somebody with the PIN can.
func (r *rig) data(label string, value []byte) {
	r.t.Helper()
	file := r.Path("object")
	if err := os.WriteFile(file, value, 0o600); err != nil {
		r.t.Fatal(err)
	}
	r.Tool("--write-object", file, "--type", "data", "--label", label, "--application-label", "kms-agent", "--private")
}

// record reads the record of a key.
func (r *rig) record(key string) []byte {
	r.t.Helper()
	file := r.Path("record")
	r.Tool("--read-object", "--type", "data", "--label", "kmsagent/"+key, "--application-label", "kms-agent", "--output-file", file)
	value, err := os.ReadFile(file)
	if err != nil {
		r.t.Fatal(err)
	}
	return value
}

func (r *rig) deleteRecord(key string) {
	r.t.Helper()
	r.Tool("--delete-object", "--type", "data", "--label", "kmsagent/"+key, "--application-label", "kms-agent")
}

// A key with two records of one revision is not used; the others are listed and used, and
// the cure that is told works.
func TestTwoRecords(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{"orders", "other"} {
		r.must(request{Command: "init-key", Key: name})
	}
	value := r.record("orders")
	r.data("kmsagent/orders", bytes.Replace(value, []byte(`"enabled"`), []byte(`"disabled"`), 1))
	if a := r.administer(request{Command: "rotate", Key: "orders"}); !strings.Contains(a.Error, "delete one of its two data objects kmsagent/orders") {
		t.Errorf("rotate: %+v", a)
	}
	r.must(request{Command: "rotate", Key: "other"})
	for _, k := range r.must(request{Command: "list"}).Keys {
		for _, v := range k.Versions {
			if named := strings.Contains(v.Problem, "two administrators"); named != (k.Key == "orders") || !named && v.Problem != "" {
				t.Errorf("list: key %s, problem %q", k.Key, v.Problem)
			}
		}
	}
	r.deleteRecord("orders")
	r.must(request{Command: "list"})
	if a := r.administer(request{Command: "rotate", Key: "orders"}); a.Error != "" {
		t.Errorf("rotate after the cure: %s", a.Error)
	}
}

// A key whose record was lost is told of, and no other is made under its name: what it has
// wrapped would be taken for damaged. With the record it is back.
func TestLostRecord(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{"orders", "other"} {
		r.must(request{Command: "init-key", Key: name})
	}
	before := r.must(request{Command: "list"}).Keys
	value := r.record("orders")
	r.deleteRecord("orders")
	a := r.administer(request{Command: "init-key", Key: "orders"})
	if !strings.Contains(a.Error, "restore it from the HSM's backup") || !strings.Contains(a.Error, before[0].Versions[0].ID) {
		t.Errorf("init-key: %+v", a)
	}
	r.must(request{Command: "init-key", Key: "order"}) // which is another name
	a, said := r.ask(request{Command: "list"})
	if len(a.Keys) != 2 || !strings.Contains(string(said), "kmsagent/orders/v1 with the ID "+before[0].Versions[0].ID+" is in no record") || strings.Count(string(said), "warning") != 1 {
		t.Errorf("list: %+v\n%s", a, said)
	}
	r.data("kmsagent/orders", value)
	if after, said := r.ask(request{Command: "list"}); len(said) > 0 || len(after.Keys) != 3 {
		t.Errorf("list with the record: %+v\n%s", after, said)
	}
}

// Who unwraps what another key has wrapped is told so, with both IDs, and a version that was
// disabled a moment ago is told to be that, whatever the token says of its key.
func TestRefusalsAreExplained(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{"orders", "other"} {
		r.must(request{Command: "init-key", Key: name})
	}
	b := newBackend()
	t.Cleanup(func() { _ = b.Close() })
	if _, err := b.Open(bounded(t), r.json()); err != nil {
		t.Fatal(err)
	}
	wrapped, err := b.Wrap(bounded(t), keyNamed("orders"), make([]byte, 32), message)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Unwrap(bounded(t), keyNamed("other"), wrapped, message); plugins.ClassOf(err) != plugins.BadCiphertext || !strings.Contains(err.Error(), "it names the key with the ID") {
		t.Errorf("Unwrap with another key: %v", err)
	}
	r.must(request{Command: "disable", Key: "orders", Version: 1, Confirmed: true})
	if _, err := b.Unwrap(bounded(t), keyNamed("orders"), wrapped, message); plugins.ClassOf(err) != plugins.KeyUnusable || !strings.Contains(err.Error(), "version 1 of key orders is disabled") {
		t.Errorf("Unwrap with a version that was just disabled: %v", err)
	}
}

// The list is not lost for the sake of a warning.
func TestListWithoutStrays(t *testing.T) {
	r := newRig(t)
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	r.settings["module"] = fault.Module
	r.must(request{Command: "init-key", Key: "orders"})
	fault.Calls()
	r.must(request{Command: "list"})
	searches := fault.Calls()["C_FindObjectsInit"]
	fault.Set(fmt.Sprintf("C_FindObjectsInit rv=0x54 skip=%d", searches-1)) // the last one alone
	a, said := r.ask(request{Command: "list"})
	if a.Error != "" || len(a.Keys) != 1 || !bytes.Contains(said, []byte("whether there are keys in no record is not known")) {
		t.Errorf("list: %+v\n%s", a, said)
	}
}

// What is wrong with the file by which commands wait for each other is told for what it is.
func TestLockThatCannotBeHeld(t *testing.T) {
	r := newRig(t)
	if err := os.Mkdir(filepath.Join(r.state(), "administer.lock"), 0o700); err != nil {
		t.Fatal(err)
	}
	if a := r.administer(request{Command: "init-key", Key: "orders"}); a.Class != "invalid" || !strings.Contains(a.Error, "this user must be able to write") {
		t.Errorf("init-key: %+v", a)
	}
}
