package hsm

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func testKey() *Key {
	v := &Version{
		Key: "orders", Number: 3, Suite: CBCHMAC, State: Enabled, ID: ID{1, 2}, macID: ID{3}, Created: time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC),
		canary: []byte("canary"), canarySum: [32]byte{9}, takes: MaxMaterial,
	}
	return &Key{Name: "orders", Current: 3, Versions: []*Version{v}, revision: 7}
}

// What stands on tokens is read by every release to come.
func TestFrozenRecord(t *testing.T) {
	const want = `{"format":1,"key":"orders","revision":7,"current":3,"versions":[{"version":3,"suite":"aes-cbc-hmac","state":"enabled",` +
		`"id":"AQIAAAAAAAAAAAAAAAAAAA==","mac_id":"AwAAAAAAAAAAAAAAAAAAAA==","takes":4096,"created":"2026-03-04T05:06:07Z",` +
		`"canary":"Y2FuYXJ5","canary_sha256":"CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}]}`
	got, err := testKey().marshal()
	if err != nil || string(got) != want {
		t.Errorf("got  %s, %v\nwant %s", got, err, want)
	}
	k, err := parseKey([]byte(want))
	if err != nil || !k.Versions[0].same(testKey().Versions[0]) || k.revision != 7 || k.Current != 3 {
		t.Errorf("parsed %+v, %v", k, err)
	}
	for name, change := range map[string][2]string{
		"another format":   {`"format":1`, `"format":2`},
		"an unknown field": {`"revision":7`, `"revision":7,"more":1`},
		"no such suite":    {"aes-cbc-hmac", "rot13"},
		"no such state":    {"enabled", "perhaps"},
		"a short ID":       {"AQIAAAAAAAAAAAAAAAAAAA==", "AQI="},
		"no second key":    {"AwAAAAAAAAAAAAAAAAAAAA==", ""},
		"no current":       {`"current":3`, `"current":4`},
		"a name":           {`"key":"orders"`, `"key":"a/b"`},
		"version 0":        {`"version":3`, `"version":0`},
		"a style too many": {`"state"`, `"iv":"caller","state"`},
		"cut off":          {`"}]}`, ""},
		"more after it":    {`"}]}`, `"}]} {}`},
	} {
		if _, err := parseKey([]byte(strings.Replace(want, change[0], change[1], 1))); err == nil {
			t.Errorf("%s: parsed", name)
		}
	}
}

func TestFrozenCatalogue(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, bytes.Repeat([]byte{7}, CatalogueKeySize), 0o600); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/catalogue")
	if err != nil {
		t.Fatal(err)
	}
	c := &CatalogueFile{Path: filepath.Join(t.TempDir(), "catalogue"), KeyFile: key}
	if err := c.write([]*Key{testKey()}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(c.Path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s, %v", got, err)
	}
	keys, err := c.parse(want)
	if err != nil || len(keys) != 1 || !keys[0].Versions[0].same(testKey().Versions[0]) {
		t.Errorf("parsed %v, %v", keys, err)
	}
}

// What parses was written by us: it is what write writes.
func FuzzParseCatalogue(f *testing.F) {
	dir := f.TempDir()
	c := &CatalogueFile{Path: filepath.Join(dir, "catalogue"), KeyFile: filepath.Join(dir, "key")}
	if err := os.WriteFile(c.KeyFile, bytes.Repeat([]byte{7}, CatalogueKeySize), 0o600); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("[]"))
	f.Add([]byte(`[{"format":1}]`))
	f.Fuzz(func(t *testing.T, body []byte) {
		if _, err := c.parse(body); err == nil {
			t.Errorf("%q has no MAC, and is taken", body)
		}
		mac, err := c.mac(body)
		if err != nil {
			t.Fatal(err)
		}
		keys, err := c.parse(append([]byte(catalogueMark+hex.EncodeToString(mac)+"\n"), body...))
		for i, k := range keys {
			if err != nil || i > 0 && keys[i-1].Name >= k.Name || checkName(k.Name) != nil {
				t.Errorf("%q gives %+v, %v", body, k, err)
			}
		}
	})
}

func TestFrozenWrapped(t *testing.T) {
	h := header{suite: GCM, flags: flagHybrid, id: ID{0xA0, 15: 0xAF}, version: 258}
	const want = "4b4157310101a00000000000000000000000000000af00000102"
	if got := hex.EncodeToString(h.append(nil)); got != want {
		t.Errorf("header %s, want %s", got, want)
	}
	if got := hex.EncodeToString(h.appendAAD(nil, []byte("ab"))); got != want+"00000000000000026162" {
		t.Errorf("AAD %s", got)
	}
	if got := hex.EncodeToString(canaryAAD("orders", ID{1})); got != hex.EncodeToString([]byte("kms-agent canary 1"))+"01"+strings.Repeat("00", 15)+"0000000000000006"+hex.EncodeToString([]byte("orders")) {
		t.Errorf("canary's AAD %s", got)
	}
}

func FuzzParseWrapped(f *testing.F) {
	f.Add(append(header{suite: GCM, version: 1}.append(nil), append([]byte{12}, make([]byte, 60)...)...))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, iv, ciphertext, err := parseWrapped(b)
		if err != nil {
			return
		}
		again := append(append(append(h.append(nil), byte(len(iv))), iv...), ciphertext...)
		if !bytes.Equal(again, b) {
			t.Errorf("%x was read as %x", b, again)
		}
	})
}

func FuzzParseKey(f *testing.F) {
	b, err := testKey().marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := parseKey(b)
		if err != nil {
			return
		}
		text, err := k.marshal()
		if err != nil {
			return // longer than a record may be, with escapes
		}
		again, err := parseKey(text)
		if err != nil || len(again.Versions) != len(k.Versions) {
			t.Fatalf("%s: %v", text, err)
		}
		for i, v := range k.Versions {
			if !v.same(again.Versions[i]) {
				t.Errorf("version %d changed: %s", v.Number, text)
			}
		}
	})
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{
		"pkcs11:", "pkcs11:object=my-pubkey;type=public", "PKCS11:token=The%20Software%20PKCS%2311%20Softtoken;serial=4D;slot-id=327",
		"pkcs11:id=%69%95%3E;object=a", "pkcs11:token=a?pin-source=file:/etc/token", "pkcs11:token=a;token=b",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if err != nil || again.String() != u.String() {
			t.Errorf("%q became %q, then %q, %v", s, u, again, err)
		}
	})
}

func TestParseURI(t *testing.T) {
	slot := uint(327)
	for text, want := range map[string]URI{
		"pkcs11:":                                                {},
		"pkcs11:object=my-pubkey;type=public":                    {Object: "my-pubkey", Type: "public"},
		"PKCS11:token=The%20Token;slot-id=327":                   {Token: "The Token", Slot: &slot},
		"pkcs11:id=%00%FF;object=a+b":                            {ID: []byte{0, 255}, Object: "a+b"},
		"pkcs11:manufacturer=M;model=N;serial=0;type=secret-key": {Manufacturer: "M", Model: "N", Serial: "0", Type: "secret-key"},
	} {
		if got, err := ParseURI(text); err != nil || got.String() != want.String() {
			t.Errorf("%q = %v, %v; want %v", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"token=a":                             "begins with pkcs11:",
		"pkcs11:token":                        "no attribute",
		"pkcs11:token=a;token=b":              "twice",
		"pkcs11:token=":                       "empty",
		"pkcs11:color=a":                      "not known",
		"pkcs11:token=%4":                     "ends within",
		"pkcs11:token=%zz":                    "no escape",
		"pkcs11:token=a b":                    "must be written as %20",
		"pkcs11:slot-id=x":                    "no number",
		"pkcs11:type=rubbish":                 "not known",
		"pkcs11:token=%ff":                    "no printable text",
		"pkcs11:token=a?pin-value=1234":       "no place in a URI",
		"pkcs11:token=a?pin-source=x":         "pin_file",
		"pkcs11:token=a?module-path=%2Fx":     "the configuration names the module",
		"pkcs11:" + strings.Repeat("a", 3000): "at most",
	} {
		if _, err := ParseURI(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", text, err, want)
		}
		if _, err := ParseURI(text); err != nil && strings.Contains(err.Error(), "1234") {
			t.Errorf("the error tells the PIN: %v", err)
		}
	}
}

// A version makes no more wraps than it may, across restarts and crashes.
func TestCounter(t *testing.T) {
	dir := t.TempDir()
	v := &Version{Key: "orders", Number: 1, Suite: GCM, ID: ID{1}}
	const share = 1 << 15 // leaves 2^17 wraps, two blocks
	worn := 0
	open := func() *Counter {
		c, err := OpenCounter(dir, share, func(_ *Version, used, limit uint64) {
			if worn++; used < limit/2 || limit != 1<<17 {
				t.Errorf("worn at %d of %d", used, limit)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c, made := open(), 0
	for ; made < 100; made++ {
		if err := c.Take(v); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c = open()
	if used, limit, err := c.Used(v); err != nil || used != 100 || limit != 1<<17 {
		t.Errorf("%d of %d are used", used, limit)
	}
	for range 10 {
		if err := c.Take(v); err != nil {
			t.Fatal(err)
		}
		made++
	}
	c = open() // as after a crash
	used, limit, err := c.Used(v)
	if err != nil {
		t.Fatal(err)
	}
	if used < uint64(made) {
		t.Errorf("%d are used, and %d were made", used, made)
	}
	for ; used < limit; used++ {
		if err := c.Take(v); err != nil {
			t.Fatalf("wrap %d of %d: %v", used, limit, err)
		}
	}
	if worn == 0 {
		t.Error("nobody was told that the version is half worn")
	}
	for _, c := range []*Counter{c, open()} {
		if err := c.Take(v); KindOf(err) != KeyUnusable || !strings.Contains(err.Error(), "rotate") {
			t.Errorf("one wrap too many: %v", err)
		}
		if err := c.Take(&Version{Suite: CBCHMAC, ID: ID{1}}); err != nil {
			t.Errorf("a suite without a limit: %v", err)
		}
	}
}

// Processes that count at the same time, as while one replaces the other, count
// together.
func TestCounterOfTwoProcesses(t *testing.T) {
	dir := t.TempDir()
	v := &Version{Key: "orders", Number: 1, Suite: GCM, ID: ID{1}}
	const share = 1 << 15
	worn, made := 0, uint64(0)
	var both [2]*Counter
	for i := range both {
		var err error
		if both[i], err = OpenCounter(dir, share, func(*Version, uint64, uint64) { worn++ }); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		for _, c := range both {
			for range 1000 {
				if err := c.Take(v); err != nil {
					t.Fatal(err)
				}
				made++
			}
		}
	}
	if err := both[0].Close(); err != nil { // what it gives back is not what the other has
		t.Fatal(err)
	}
	if used, _, err := both[1].Used(v); err != nil || used != made {
		t.Errorf("%d are used, %d were made: %v", used, made, err)
	}
	for both[1].Take(v) == nil {
		made++
	}
	if made != 1<<17 || worn == 0 {
		t.Errorf("%d wraps were made, want 2^17; told %d times that it is half worn", made, worn)
	}
}

// login is a token that accepts one PIN and counts attempts.
type login struct {
	pin   string
	tries int
}

func (l *login) log(pin []byte) error {
	if l.tries++; string(pin) != l.pin {
		return errPIN
	}
	return nil
}

// A PIN is tried once until it was accepted, whatever happens.
func TestLedger(t *testing.T) {
	dir := t.TempDir()
	pin := dir + "/pin"
	write := func(text string) {
		if err := writeFile(pin, text); err != nil {
			t.Fatal(err)
		}
	}
	ledgerOf := func() *Ledger { return &Ledger{Path: dir + "/logins", PIN: PINSource{File: pin}} }
	token, other := TokenInfo{Label: "kms", Serial: "1"}, TokenInfo{Label: "kms", Serial: "2"}
	device := &login{pin: "right"}

	write("wrong\n")
	if err := ledgerOf().Attempt(token, device.log); stepFor(err) != fixPIN {
		t.Errorf("a wrong PIN: %v", err)
	}
	for range 5 { // each as a new process
		if err := ledgerOf().Attempt(token, device.log); KindOf(err) != Unauthenticated || strings.Contains(err.Error(), "wrong PIN\n") {
			t.Errorf("the wrong PIN again: %v", err)
		}
	}
	if device.tries != 1 {
		t.Errorf("%d tries, want 1", device.tries)
	}
	write("right\n")
	for range 3 {
		if err := ledgerOf().Attempt(token, device.log); err != nil {
			t.Errorf("the right PIN: %v", err)
		}
	}
	if device.tries != 4 {
		t.Errorf("%d tries, want 4: an accepted PIN is tried whenever it is needed", device.tries)
	}
	// Another process has found out that the PIN is right; somebody has replaced it.
	for name, change := range map[string]func(){
		"ledger": func() {
			if err := ledgerOf().Attempt(other, device.log); err != nil {
				t.Fatal(err)
			}
		},
		"mode": func() {
			if err := os.Chmod(pin, 0o400); err != nil {
				t.Fatal(err)
			}
		},
	} {
		waiting := ledgerOf()
		if err := waiting.Attempt(token, device.log); err != nil {
			t.Fatal(err)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if err := waiting.Changed(ended); err == nil {
			t.Errorf("%s: changed before", name)
		}
		change()
		if err := waiting.Changed(t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	other.Serial, device.tries = "3", 4
	// Another token is another matter; a crash in the middle counts as a try.
	crash := errors.New("killed")
	if err := ledgerOf().Attempt(other, func([]byte) error { return crash }); !errors.Is(err, crash) {
		t.Errorf("the crash: %v", err)
	}
	if err := ledgerOf().Attempt(other, device.log); KindOf(err) != Unauthenticated || !strings.Contains(err.Error(), "--retry-pin") {
		t.Errorf("after the crash: %v", err)
	}
	retry := ledgerOf()
	retry.Retry = true
	if err := retry.Attempt(other, device.log); err != nil {
		t.Errorf("by an operator's word: %v", err)
	}
	// What the token says counts too.
	for name, c := range map[string]struct {
		pin   string
		flags uint
		want  string
	}{
		"locked":                  {"right", 0x40000, "locked"},
		"its last try":            {"right", 0x20000, "one try left"},
		"wrong ones, not of ours": {"right", 0x10000, "wrong PINs were tried"},
	} {
		info := TokenInfo{Label: "fresh", Serial: name, Flags: c.flags}
		if err := ledgerOf().Attempt(info, device.log); KindOf(err) != Unauthenticated || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	// A login that was not needed is no attempt.
	other.Serial = "4"
	for range 3 {
		loggedIn := func([]byte) error { return errLoggedIn }
		if err := ledgerOf().Attempt(other, loggedIn); !errors.Is(err, errLoggedIn) {
			t.Errorf("logged in already: %v", err)
		}
	}
	if err := ledgerOf().Attempt(other, device.log); err != nil {
		t.Errorf("after others were logged in: %v", err)
	}
	if err := writeFile(dir+"/logins", "rubbish"); err != nil {
		t.Fatal(err)
	}
	before := device.tries
	if err := ledgerOf().Attempt(token, device.log); KindOf(err) != Unauthenticated || device.tries != before {
		t.Errorf("with a damaged ledger: %v, %d tries", err, device.tries-before)
	}
}

// What the host's disk does to the ledger is no refusal of the PIN, and no login is tried.
func TestLedgerThatCannotBeKept(t *testing.T) {
	dir := t.TempDir()
	if err := writeFile(dir+"/pin", "right"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir+"/logins.lock", 0o700); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"no lock":  dir + "/logins",
		"no write": dir + "/" + strings.Repeat("x", 250), // there is room for the lock's name, and not for a longer one
	} {
		device := &login{pin: "right"}
		l := &Ledger{Path: path, PIN: PINSource{File: dir + "/pin"}}
		if err := l.Attempt(TokenInfo{Label: "kms"}, device.log); KindOf(err) != Unavailable || device.tries != 0 {
			t.Errorf("%s: %v, %d tries; want Unavailable and none", name, err, device.tries)
		}
	}
}

// Where wraps cannot be counted there are none, and that is an outage.
func TestCounterThatCannotBeKept(t *testing.T) {
	dir := t.TempDir()
	c, err := OpenCounter(dir, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir+"/wraps.json.lock", 0o700); err != nil {
		t.Fatal(err)
	}
	v := &Version{Key: "orders", Number: 1, Suite: GCM, ID: ID{1}}
	if err := c.Take(v); KindOf(err) != Unavailable {
		t.Errorf("without a lock: %v, want Unavailable", err)
	}
	if err := os.Remove(dir + "/wraps.json.lock"); err != nil {
		t.Fatal(err)
	}
	if err := c.Take(v); err != nil {
		t.Errorf("with it: %v", err)
	}
	if err := writeFile(dir+"/wraps.json", `{"format":1,"wraps":{"`); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCounter(dir, 1, nil); err == nil {
		t.Error("a damaged file begins anew")
	}
}

func TestPINSource(t *testing.T) {
	dir := t.TempDir()
	path := dir + "/pin"
	read := func(s PINSource) (got string, err error) {
		err = s.read(func(pin []byte) error { got = string(pin); return nil })
		return got, err
	}
	for content, want := range map[string]string{"1234": "1234", "1234\n": "1234", "1234\r\n": "1234", "user:pass word \n": "user:pass word "} {
		if err := writeFile(path, content); err != nil {
			t.Fatal(err)
		}
		if got, err := read(PINSource{File: path}); err != nil || got != want {
			t.Errorf("%q = %q, %v", content, got, err)
		}
	}
	for content, want := range map[string]string{"": "empty", "\n": "empty", "a\nb\n": "more than one line", strings.Repeat("x", 2000): "longer"} {
		if err := writeFile(path, content); err != nil {
			t.Fatal(err)
		}
		if _, err := read(PINSource{File: path}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v, want %q", content, err, want)
		}
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	t.Setenv("THE_PIN", "5678")
	if err := writeFile(path, "1234"); err != nil {
		t.Fatal(err)
	}
	for want, s := range map[string]PINSource{"1234": {Credential: "pin"}, "5678": {Variable: "THE_PIN"}} {
		if got, err := read(s); err != nil || got != want {
			t.Errorf("%+v = %q, %v", s, got, err)
		}
	}
	for want, s := range map[string]PINSource{"no such file": {File: dir + "/missing"}, "no name": {Credential: "../pin"}, "not set": {Variable: "NO_PIN"}, "regular": {File: dir}} {
		if _, err := read(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", s, err, want)
		}
	}
	if err := chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := read(PINSource{File: path}); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("open to all: %v", err)
	}
}
