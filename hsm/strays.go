package hsm

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// Stray is a key on the token that is labelled as one of ours and stands in no record:
// its record was lost, or it was being made when that was cut off.
type Stray struct {
	Key, Label string // the name of the key, and the label with the number of its version
	ID         []byte
}

var keyLabel = regexp.MustCompile("^" + regexp.QuoteMeta(labelPrefix) + `([A-Za-z0-9._-]+)/v[1-9][0-9]{0,9}$`)

// Strays returns the strays among the first secret keys and private keys on the token, of
// which it looks at ten thousand, by label. Keys that are being made just now may be among
// them.
func (t *Token) Strays(ctx context.Context) ([]Stray, error) {
	strays, err := t.labelled(ctx) // first, as who makes a key writes its record last
	if err != nil {
		return nil, err
	}
	keys, err := t.readKeys(ctx, "")
	if err != nil && !errors.Is(err, errNoCatalogue) {
		return nil, err
	}
	known, unknown := map[string]bool{}, map[string]bool{} // IDs, and keys one of whose records we do not see
	for _, k := range keys {
		unknown[k.Name] = k.Conflict != nil
		for _, v := range k.Versions {
			known[string(v.ID[:])], known[string(v.macID[:])] = true, true
		}
	}
	strays = slices.DeleteFunc(strays, func(s Stray) bool { return known[string(s.ID)] || unknown[s.Key] })
	slices.SortFunc(strays, func(a, b Stray) int { return strings.Compare(a.Label, b.Label) })
	return strays, nil
}

// maxLabelled is how many keys of a class are looked at.
const maxLabelled = 10000

func (t *Token) labelled(ctx context.Context) ([]Stray, error) {
	found := new([]Stray)
	err := t.manage(ctx, func(w *worker) (err error) {
		*found, err = labelled(w)
		return err
	})
	return *found, err
}

// labelled returns the keys that are labelled as ours, as far as they say that.
func labelled(w *worker) (all []Stray, err error) {
	for _, class := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY} {
		objects, err := findPrivate(w.session, []cryptoki.Attribute{
			cryptoki.Number(pkcs11.CKA_CLASS, class), cryptoki.Bool(pkcs11.CKA_TOKEN, true), cryptoki.Bool(pkcs11.CKA_PRIVATE, true),
		}, maxLabelled)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			w.lives() // it is calls by the hundred, none of which hangs
			label, err := attributeOf(w.session, o, pkcs11.CKA_LABEL)
			if err != nil {
				return nil, err
			}
			name := keyLabel.FindSubmatch(label)
			if name == nil {
				continue
			}
			id, err := attributeOf(w.session, o, pkcs11.CKA_ID)
			if err != nil {
				return nil, err
			}
			all = append(all, Stray{Key: string(name[1]), Label: string(label), ID: id})
		}
	}
	return all, nil
}

// attributeOf reads an attribute, nil where there is none.
func attributeOf(s cryptoki.Session, o cryptoki.Object, attribute uint) ([]byte, error) {
	value, err := s.Attribute(o, attribute)
	if errors.Is(err, cryptoki.ErrNoAttribute) {
		return nil, nil
	}
	return value, err
}

// mayCreate refuses to make a key whose record was lost, it seems: what the old one has
// wrapped would be taken for damaged.
func (t *Token) mayCreate(ctx context.Context, name string) error {
	all, err := t.labelled(ctx)
	if err != nil {
		return err
	}
	var ids []string
	for _, s := range all {
		if s.Key == name {
			ids = append(ids, fmt.Sprintf("%s with the ID %x", s.Label, s.ID))
		}
	}
	if len(ids) == 0 {
		return nil
	}
	if err := t.isNew(ctx, name); err != nil { // another host may have made it meanwhile
		return err
	}
	return errorf(Invalid, nil, "the token has keys of %s without a record: %s. Where the record was lost, restore it from the HSM's backup (the private data object %s%s of application %s) "+
		"before you do anything else. Only where nothing was ever encrypted with it, as when init-key was cut off, delete them with the vendor's tool, or take another name",
		name, strings.Join(ids[:min(len(ids), 4)], ", "), labelPrefix, name, application)
}
