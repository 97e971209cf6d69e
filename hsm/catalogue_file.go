package hsm

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

const (
	// CatalogueKeySize is the size of the key that authenticates a catalogue, in bytes.
	CatalogueKeySize = 32
	// maxCatalogue is how many bytes a catalogue has at most.
	maxCatalogue = 16 << 20
	// catalogueMark begins the first line, which ends with the MAC of all after it.
	catalogueMark = "kms-agent-hsm-catalogue 1 "
)

// CatalogueFile holds the records of the keys on a token that takes no private data
// objects. It is distributed to the hosts that use the token like configuration, with
// its key. A MAC (HMAC-SHA256) keeps those who have the file and not the key from
// changing it. Processes may share it; it is read again when it changes.
type CatalogueFile struct {
	// Path is the absolute path of the file.
	Path string
	// KeyFile is the absolute path of CatalogueKeySize random bytes, readable by
	// this process's user alone. The first key that is made makes it too.
	KeyFile string
}

// errNoCatalogue says that there is no file yet.
var errNoCatalogue = errors.New("there is no catalogue")

// records returns the records in the file, by name. A file that cannot be read is an
// outage: it says nothing about keys.
func (c *CatalogueFile) records() ([]*Key, error) {
	content, err := c.read()
	if err != nil {
		return nil, err
	}
	keys, err := c.parse(content)
	if err != nil {
		return nil, errorf(Unavailable, err, "the catalogue %s cannot be used", c.Path)
	}
	return keys, nil
}

func (c *CatalogueFile) read() ([]byte, error) {
	f, err := os.Open(c.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errorf(Unavailable, errNoCatalogue, "%s: copy it from a host that has it, or make the first key with 'kms-agent hsm init-key'", c.Path)
	}
	if err != nil {
		return nil, errorf(Unavailable, err, "the catalogue")
	}
	defer func() { _ = f.Close() }()
	content, err := io.ReadAll(io.LimitReader(f, maxCatalogue+1))
	if err != nil {
		return nil, errorf(Unavailable, err, "the catalogue")
	}
	return content, nil
}

// parse checks the MAC before it looks at anything else.
func (c *CatalogueFile) parse(content []byte) ([]*Key, error) {
	if len(content) > maxCatalogue {
		return nil, fmt.Errorf("more than %d bytes", maxCatalogue)
	}
	line, body, ok := bytes.Cut(content, []byte("\n"))
	mark, isOurs := strings.CutPrefix(string(line), catalogueMark)
	given, err := hex.DecodeString(mark)
	if !ok || !isOurs || err != nil || len(given) != sha256.Size {
		return nil, errors.New("it does not begin as a catalogue of format 1 does: is this the right file, and whole?")
	}
	want, err := c.mac(body)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(given, want) {
		return nil, fmt.Errorf("its MAC is wrong: it was changed by other means than 'kms-agent hsm', or %s is the key of another catalogue", c.KeyFile)
	}
	var raw []json.RawMessage
	if err := json.Unmarshal(body, &raw); err != nil {
		return nil, err
	}
	keys := make([]*Key, 0, len(raw))
	for _, r := range raw {
		k, err := parseKey(r)
		if err != nil {
			return nil, err
		}
		if n := len(keys); n > 0 && keys[n-1].Name >= k.Name {
			return nil, errors.New("its keys are not in order")
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// replace writes a key's record in the place of the one before, which must be what
// the caller has read.
func (c *CatalogueFile) replace(k *Key) error {
	unlock, err := lockFile(c.Path+".lock", lockPatience)
	if err != nil {
		return errorf(Unavailable, err, "the catalogue %s", c.Path)
	}
	defer unlock()
	keys, err := c.records()
	if errors.Is(err, errNoCatalogue) {
		keys, err = nil, c.makeKey()
	}
	if err != nil {
		return err
	}
	at, found := slices.BinarySearchFunc(keys, k.Name, func(k *Key, name string) int { return strings.Compare(k.Name, name) })
	before := uint64(0)
	if found {
		before = keys[at].revision
	}
	if before+1 != k.revision {
		return errorf(Invalid, nil, "somebody else changes key %s just now: try again", k.Name)
	}
	if found {
		keys[at] = k
	} else {
		keys = slices.Insert(keys, at, k)
	}
	return c.write(keys)
}

func (c *CatalogueFile) write(keys []*Key) error {
	raw := make([]json.RawMessage, 0, len(keys))
	for _, k := range keys {
		b, err := k.marshal()
		if err != nil {
			return errorf(Invalid, err, "")
		}
		raw = append(raw, b)
	}
	body, err := json.MarshalIndent(raw, "", " ")
	if err != nil {
		return errorf(Invalid, err, "")
	}
	mac, err := c.mac(body)
	if err != nil {
		return errorf(Unavailable, err, "the catalogue %s cannot be written", c.Path)
	}
	content := append([]byte(catalogueMark+hex.EncodeToString(mac)+"\n"), body...)
	if len(content) > maxCatalogue {
		return errorf(Invalid, nil, "the catalogue %s would be larger than %d bytes: use another one for some of the keys", c.Path, maxCatalogue)
	}
	if err := renameio.WriteFile(c.Path, content, 0o600); err != nil {
		return errorf(Unavailable, err, "the catalogue %s cannot be written", c.Path)
	}
	if err := syncDirectory(filepath.Dir(c.Path)); err != nil {
		return errorf(Unavailable, err, "the catalogue %s is written, and may be lost with the power", c.Path)
	}
	return nil
}

func (c *CatalogueFile) mac(body []byte) ([]byte, error) {
	key := make([]byte, CatalogueKeySize+1)
	defer clear(key)
	n, err := readPrivate(c.KeyFile, ownerOnly, key, "the key of the catalogue")
	if err != nil {
		return nil, err
	}
	if n != CatalogueKeySize {
		return nil, fmt.Errorf("the key of the catalogue: %s has not the %d bytes that such a key has", c.KeyFile, CatalogueKeySize)
	}
	mac := hmac.New(sha256.New, key[:n])
	_, _ = io.WriteString(mac, catalogueMark)
	_, _ = mac.Write(body)
	return mac.Sum(nil), nil
}

// mayBegin returns why there must be no new catalogue: where the key of one is there, the
// one that is missing told of other keys, and who gets the new one takes them for gone.
func (c *CatalogueFile) mayBegin() error {
	if _, err := os.Lstat(c.KeyFile); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errorf(Invalid, errNoCatalogue, "%s is missing, and its key %s is there: copy the catalogue from a host that has it; where there was none, remove the key", c.Path, c.KeyFile)
}

// makeKey makes the key of a catalogue that begins.
func (c *CatalogueFile) makeKey() error {
	if err := c.mayBegin(); err != nil {
		return err
	}
	f, err := os.OpenFile(c.KeyFile, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return errorf(Unavailable, err, "the key of the catalogue")
	}
	key := make([]byte, CatalogueKeySize)
	defer clear(key)
	if _, err = rand.Read(key); err == nil {
		_, err = f.Write(key)
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errorf(Unavailable, errors.Join(err, os.Remove(c.KeyFile)), "the key of the catalogue")
	}
	if err := syncDirectory(filepath.Dir(c.KeyFile)); err != nil {
		return errorf(Unavailable, err, "the key of the catalogue")
	}
	return nil
}
