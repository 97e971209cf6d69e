package hsm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

const (
	// application and labelPrefix mark what is ours on a token.
	application = "kms-agent"
	labelPrefix = "kmsagent/"
	// catalogueAge is how old what was read of the catalogue may be: another host
	// may have rotated or disabled.
	catalogueAge = time.Second
	// maxRecord is how many bytes the record of a key has at most, maxKeys how many
	// keys are looked at.
	maxRecord  = 60 << 10
	maxKeys    = 1000
	nameLength = 64
)

// Key is a key on the token with its versions, the oldest first.
type Key struct {
	Name     string
	Current  uint32
	Versions []*Version
	// Note says, of a change that was made, which public keys did not follow; mostly
	// empty. They open nothing.
	Note string
	// Conflict says that two administrators have changed the key at once, so that nobody
	// knows which of two records holds: it is not used. Mostly nil.
	Conflict error

	revision uint64
}

// Version returns a version by its number.
func (k *Key) Version(number uint32) (*Version, error) {
	for _, v := range k.Versions {
		if v.Number == number {
			return v, nil
		}
	}
	return nil, errorf(KeyNotFound, nil, "key %s has no version %d", k.Name, number)
}

// record is how a key stands on the token: the value of a private data object, as
// JSON. Who changes a key writes a record with the next revision and destroys those
// before.
type record struct {
	Format   int             `json:"format"`
	Key      string          `json:"key"`
	Revision uint64          `json:"revision"`
	Current  uint32          `json:"current"`
	Versions []versionRecord `json:"versions"`
}

type versionRecord struct {
	Version   uint32    `json:"version"`
	Suite     string    `json:"suite"`
	IV        string    `json:"iv,omitempty"`
	State     string    `json:"state"`
	ID        []byte    `json:"id"`
	MACID     []byte    `json:"mac_id,omitempty"`
	Takes     int       `json:"takes"`
	Created   time.Time `json:"created"`
	Canary    []byte    `json:"canary"`
	CanarySum []byte    `json:"canary_sha256"`
}

func (k *Key) marshal() ([]byte, error) {
	r := record{Format: 1, Key: k.Name, Revision: k.revision, Current: k.Current}
	for _, v := range k.Versions {
		e := versionRecord{
			Version: v.Number, Suite: v.Suite.String(), IV: v.style.String(), State: v.State.String(), ID: v.ID[:], Takes: v.takes,
			Created: v.Created.UTC().Truncate(time.Second), Canary: v.canary, CanarySum: v.canarySum[:],
		}
		if v.Suite == CBCHMAC {
			e.MACID = v.macID[:]
		}
		r.Versions = append(r.Versions, e)
	}
	b, err := json.Marshal(r)
	if err == nil && len(b) > maxRecord {
		return nil, fmt.Errorf("key %s has too many versions for its record: destroy old ones", k.Name)
	}
	return b, err
}

// parseKey reads a record. It is strict: what it does not know it does not use.
func parseKey(b []byte) (*Key, error) {
	if len(b) > maxRecord {
		return nil, fmt.Errorf("a record of %d bytes, at most %d are possible", len(b), maxRecord)
	}
	var r record
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more after the record")
	}
	if r.Format != 1 {
		return nil, fmt.Errorf("format %d: this release reads format 1", r.Format)
	}
	if err := checkName(r.Key); err != nil {
		return nil, err
	}
	k := &Key{Name: r.Key, Current: r.Current, revision: r.Revision}
	for _, e := range r.Versions {
		v, err := e.version(r.Key)
		if err != nil {
			return nil, fmt.Errorf("version %d: %w", e.Version, err)
		}
		if n := len(k.Versions); n > 0 && k.Versions[n-1].Number >= v.Number {
			return nil, errors.New("the versions are not in order")
		}
		k.Versions = append(k.Versions, v)
	}
	if _, err := k.Version(k.Current); err != nil {
		return nil, err
	}
	return k, nil
}

func (e versionRecord) version(key string) (*Version, error) {
	v := &Version{Key: key, Number: e.Version, Created: e.Created, canary: e.Canary, takes: e.Takes}
	var errs [3]error
	v.Suite, errs[0] = ParseSuite(e.Suite)
	v.State, errs[1] = parseState(e.State)
	v.style, errs[2] = parseIVStyle(e.IV)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	wantMAC := 0
	if v.Suite == CBCHMAC {
		wantMAC = idSize
	}
	if v.Number == 0 || len(e.ID) != idSize || len(e.MACID) != wantMAC || len(e.CanarySum) != len(v.canarySum) || e.Takes < oneUseKey || e.Takes > MaxMaterial {
		return nil, errors.New("a field has the wrong size")
	}
	if (v.Suite == GCM) != (v.style != 0) {
		return nil, fmt.Errorf("IV style %q does not go with %v", e.IV, v.Suite)
	}
	copy(v.ID[:], e.ID)
	copy(v.macID[:], e.MACID)
	copy(v.canarySum[:], e.CanarySum)
	return v, nil
}

// checkName keeps names to what can stand in a label, a URI and a shell.
func checkName(name string) error {
	if name == "" || len(name) > nameLength {
		return fmt.Errorf("a key's name has 1 to %d characters", nameLength)
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return fmt.Errorf("key name %q: letters, digits, - _ . are possible", name)
		}
	}
	return nil
}

// Key returns a key by its name, as it stood on the token at most a second ago.
func (t *Token) Key(ctx context.Context, name string) (*Key, error) {
	if got, ok := t.keys.cached(name); ok && time.Duration(t.now()-got.at) < catalogueAge {
		return got.key, nil
	}
	return t.readKey(ctx, name)
}

// Version returns a version of a key.
func (t *Token) Version(ctx context.Context, name string, number uint32) (*Version, error) {
	k, err := t.Key(ctx, name)
	if err != nil {
		return nil, err
	}
	v, err := k.Version(number)
	if err == nil || t.keys.lookedInVain(name, t.now()) {
		return v, err
	}
	at := t.now()
	if k, err = t.readKey(ctx, name); err != nil { // it may be new
		return nil, err
	}
	if v, err = k.Version(number); err != nil {
		t.keys.inVain(name, at)
	}
	return v, err
}

// readKey reads a key from the token.
func (t *Token) readKey(ctx context.Context, name string) (*Key, error) {
	if err := checkName(name); err != nil {
		return nil, errorf(KeyNotFound, err, "")
	}
	at := t.now()
	keys, err := t.readKeys(ctx, name)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		switch {
		case k.Name != name:
		case k.Conflict != nil:
			t.keys.forget(name)
			return nil, k.Conflict
		default:
			return t.keys.keep(k, at), nil
		}
	}
	t.keys.forget(name)
	return nil, errorf(KeyNotFound, nil, "the token has no record of key %s: if it was there before, restore it from the HSM's backup, else create it with 'kms-agent hsm init-key'", name)
}

// Keys returns all keys on the token, by name.
func (t *Token) Keys(ctx context.Context) ([]*Key, error) {
	at := t.now()
	keys, err := t.readKeys(ctx, "")
	if err != nil {
		return nil, err
	}
	for i, k := range keys {
		if k.Conflict == nil {
			keys[i] = t.keys.keep(k, at)
		}
	}
	return keys, nil
}

// readKeys returns the latest record of the key with a name, or of all for "".
func (t *Token) readKeys(ctx context.Context, name string) ([]*Key, error) {
	if t.cfg.Catalogue != nil {
		return t.cfg.Catalogue.records()
	}
	found := new([]*Key)
	err := t.manage(ctx, func(w *worker) (err error) {
		*found, err = records(w, name)
		return err
	})
	if err == nil && len(*found) == 0 {
		err = t.sure(ctx) // some modules find nothing where the token is gone
	}
	if err != nil {
		return nil, err
	}
	return *found, nil
}

// errTwice says that a key has two records of one revision.
var errTwice = errors.New("two records")

// entry is one record on the token.
type entry struct {
	key    *Key
	object cryptoki.Object
	value  []byte
}

// records reads the records on the token, of one key or of all.
func records(w *worker, name string) ([]*Key, error) {
	list, err := entries(w, name)
	if err != nil {
		return nil, err
	}
	found := map[string]entry{}
	for _, e := range list {
		switch old, ok := found[e.key.Name]; {
		case !ok || old.key.revision < e.key.revision:
			found[e.key.Name] = e
		case old.key.revision == e.key.revision && !bytes.Equal(old.value, e.value):
			old.key.Conflict = errorf(Broken, errTwice, "key %s was changed by two administrators at once, and nobody knows which change holds: delete one of its two data objects "+
				"%s%s of application %s with the vendor's tool, and see with 'kms-agent hsm list' which is left", e.key.Name, labelPrefix, e.key.Name, application)
		}
	}
	keys := make([]*Key, 0, len(found))
	for _, e := range found {
		keys = append(keys, e.key)
	}
	slices.SortFunc(keys, func(a, b *Key) int { return strings.Compare(a.Name, b.Name) })
	return keys, nil
}

// entries reads all records, those too that another follows. One that is replaced
// meanwhile is in a list that is read anew: a key is not gone because it changes.
func entries(w *worker, name string) (list []entry, err error) {
	for range attempts {
		if list, err = entriesOnce(w, name); stepFor(err) != findAgain && !errors.Is(err, cryptoki.ErrNoAttribute) {
			return list, err
		}
	}
	return nil, err
}

// recordsOf is what the records of a key have, or all for "".
func recordsOf(name string) []cryptoki.Attribute {
	template := []cryptoki.Attribute{
		cryptoki.Number(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), cryptoki.Bool(pkcs11.CKA_TOKEN, true), cryptoki.Bool(pkcs11.CKA_PRIVATE, true),
		cryptoki.Text(pkcs11.CKA_APPLICATION, application),
	}
	if name != "" {
		template = append(template, cryptoki.Text(pkcs11.CKA_LABEL, labelPrefix+name))
	}
	return template
}

// entriesOnce reads private objects alone: everybody who reaches the token can make public
// ones, without a PIN.
func entriesOnce(w *worker, name string) ([]entry, error) {
	objects, err := findPrivate(w.session, recordsOf(name), maxKeys)
	if err != nil {
		return nil, err
	}
	list := make([]entry, 0, len(objects))
	for _, o := range objects {
		w.lives() // it is calls by the hundred, none of which hangs
		value, err := w.session.Attribute(o, pkcs11.CKA_VALUE)
		if err != nil {
			return nil, err
		}
		k, err := parseKey(value)
		if err != nil {
			return nil, errorf(Broken, err, "the private data object %s of application %s on the token is no record that this release can read (restore it, or destroy it if it is not the agent's)",
				labelOf(w.session, o), application)
		}
		list = append(list, entry{key: k, object: o, value: value})
	}
	return list, nil
}

// labelOf is how a message names an object on the token.
func labelOf(s cryptoki.Session, o cryptoki.Object) string {
	label, err := s.Attribute(o, pkcs11.CKA_LABEL)
	if err != nil {
		return "without a label"
	}
	return strconv.Quote(string(label))
}
