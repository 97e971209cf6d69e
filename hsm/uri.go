package hsm

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxURI is how many bytes a URI has at most.
const maxURI = 2048

// URI is a PKCS#11 URI (RFC 7512) that selects a token, or a key on one. What is
// empty matches anything.
type URI struct {
	// Token, Manufacturer, Model and Serial are what the token says of itself.
	Token, Manufacturer, Model, Serial string
	// Slot is the slot's number; nil is any. Slot numbers change with every start of
	// some modules.
	Slot *uint
	// Object is the key's label, ID its CKA_ID, Type its class ("secret-key").
	Object string
	ID     []byte
	Type   string
}

// ParseURI reads a URI. It refuses what would be ignored otherwise: attributes that
// it does not know, attributes given twice, and secrets.
func ParseURI(text string) (URI, error) {
	if len(text) > maxURI {
		return URI{}, fmt.Errorf("a PKCS#11 URI has %d bytes at most, this one has %d", maxURI, len(text))
	}
	scheme, rest, found := strings.Cut(text, ":")
	if !found || !strings.EqualFold(scheme, "pkcs11") {
		return URI{}, errors.New("a PKCS#11 URI begins with pkcs11: as in pkcs11:token=kms;object=orders")
	}
	path, query, _ := strings.Cut(rest, "?")
	var u URI
	seen := map[string]bool{}
	for part := range strings.SplitSeq(path, ";") {
		if part == "" && path == "" {
			break
		}
		name, value, err := attribute(part, seen)
		if err == nil {
			err = u.set(name, value)
		}
		if err != nil {
			return URI{}, err
		}
	}
	for part := range strings.SplitSeq(query, "&") {
		if part == "" && query == "" {
			break
		}
		name, _, err := attribute(part, seen)
		if err != nil {
			return URI{}, err
		}
		return URI{}, queryFault(name)
	}
	return u, nil
}

// attribute splits name=value and decodes the value.
func attribute(part string, seen map[string]bool) (name, value string, err error) {
	name, encoded, found := strings.Cut(part, "=")
	if !found || name == "" {
		return "", "", fmt.Errorf("%.64q is no attribute: they are written name=value, with ; between them", part)
	}
	if seen[name] {
		return "", "", fmt.Errorf("attribute %.64q is given twice", name)
	}
	seen[name] = true
	value, err = decode(encoded)
	if err != nil {
		return "", "", fmt.Errorf("attribute %.64q: %w", name, err)
	}
	return name, value, nil
}

func queryFault(name string) error {
	switch name {
	case "pin-value":
		return errors.New("a PIN has no place in a URI: put it into a file and name that as pin_file")
	case "pin-source":
		return errors.New("pin-source has no place here: name the file as pin_file")
	case "module-name", "module-path":
		return fmt.Errorf("%s has no place here: the configuration names the module", name)
	}
	return fmt.Errorf("attribute %.64q is not known", name)
}

func (u *URI) set(name, value string) error {
	texts := map[string]*string{
		"token": &u.Token, "manufacturer": &u.Manufacturer, "model": &u.Model, "serial": &u.Serial, "object": &u.Object, "type": &u.Type,
	}
	if to, ok := texts[name]; ok {
		if value == "" {
			return fmt.Errorf("attribute %q is empty", name)
		}
		if !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return fmt.Errorf("attribute %q is no printable text", name)
		}
		*to = value
		if name == "type" && !slices.Contains([]string{"secret-key", "private", "public", "data", "cert"}, value) {
			return fmt.Errorf("type %.64q is not known: secret-key, private, public, data and cert are", value)
		}
		return nil
	}
	switch name {
	case "id":
		if value == "" {
			return errors.New(`attribute "id" is empty`)
		}
		u.ID = []byte(value)
		return nil
	case "slot-id":
		n, err := strconv.ParseUint(value, 10, 63)
		if err != nil {
			return fmt.Errorf("slot-id %.64q is no number", value)
		}
		slot := uint(n)
		u.Slot = &slot
		return nil
	}
	return queryFault(name)
}

// decode undoes percent-encoding; a plus is a plus.
func decode(s string) (string, error) {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '%':
			if i+2 >= len(s) {
				return "", errors.New("ends within an escape such as %20")
			}
			b, err := hex.DecodeString(s[i+1 : i+3])
			if err != nil {
				return "", fmt.Errorf("%q is no escape such as %%20", s[i:i+3])
			}
			out.WriteByte(b[0])
			i += 2
		case plain(c):
			out.WriteByte(c)
		default:
			return "", fmt.Errorf("the character %q must be written as %%%02X", string(rune(c)), c)
		}
	}
	return out.String(), nil
}

// plain tells what may stand unescaped in every attribute: RFC 7512, section 2.3,
// without "/" and "&", which only some may have.
func plain(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~:[]@!$'()*+,", c) >= 0
}

// String returns the URI in one form: attributes in a fixed order, escapes where
// they are needed only.
func (u URI) String() string {
	var parts []string
	add := func(name, value string) {
		if value == "" {
			return
		}
		var b strings.Builder
		for i := range len(value) {
			if c := value[i]; plain(c) {
				b.WriteByte(c)
			} else {
				fmt.Fprintf(&b, "%%%02X", c)
			}
		}
		parts = append(parts, name+"="+b.String())
	}
	add("token", u.Token)
	add("manufacturer", u.Manufacturer)
	add("model", u.Model)
	add("serial", u.Serial)
	if u.Slot != nil {
		parts = append(parts, "slot-id="+strconv.FormatUint(uint64(*u.Slot), 10))
	}
	add("object", u.Object)
	add("id", string(u.ID))
	add("type", u.Type)
	return "pkcs11:" + strings.Join(parts, ";")
}

// NamesToken tells whether the URI says anything of a token.
func (u URI) NamesToken() bool {
	return u.Token != "" || u.Manufacturer != "" || u.Model != "" || u.Serial != "" || u.Slot != nil
}

// MatchesToken tells whether a token is what the URI selects.
func (u URI) MatchesToken(label, manufacturer, model, serial string, slot uint) bool {
	for _, pair := range [][2]string{{u.Token, label}, {u.Manufacturer, manufacturer}, {u.Model, model}, {u.Serial, serial}} {
		if pair[0] != "" && pair[0] != pair[1] {
			return false
		}
	}
	return u.Slot == nil || *u.Slot == slot
}
