package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// maxPIN is how many bytes a PIN has at most.
const maxPIN = 1024

// PINSource says where the PIN is. Exactly one field is set. It is read again for
// each login.
type PINSource struct {
	// File is the absolute path of a file whose only line is the PIN. It belongs to
	// this process's user or to root, and nobody else can read it.
	File string
	// Credential is the name of a systemd credential, in $CREDENTIALS_DIRECTORY.
	Credential string
	// Variable is the name of an environment variable: who may read the process's
	// environment reads it, so the others are better.
	Variable string
}

// path returns the file that holds the PIN, "" where none does.
func (s PINSource) path() (string, error) {
	if s.Credential == "" {
		return s.File, nil
	}
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return "", errors.New("the PIN is a credential, and $CREDENTIALS_DIRECTORY is not set: run the agent as a systemd unit with LoadCredential=")
	}
	if strings.ContainsRune(s.Credential, '/') || s.Credential == "." || s.Credential == ".." {
		return "", fmt.Errorf("credential %q: this is no name of a credential", s.Credential)
	}
	return filepath.Join(dir, s.Credential), nil
}

// read calls use with the PIN, which is erased afterwards.
func (s PINSource) read(use func(pin []byte) error) error {
	memory, err := newSlab(maxPIN + 2)
	if err != nil {
		return err
	}
	defer memory.free()
	n := 0
	if s.Variable != "" {
		value, ok := os.LookupEnv(s.Variable)
		if !ok {
			return fmt.Errorf("the environment variable %s, which should hold the PIN, is not set", s.Variable)
		}
		n = copy(memory, value)
	} else if n, err = s.readFile(memory); err != nil {
		return err
	}
	pin := bytes.TrimSuffix(bytes.TrimSuffix(memory[:n], []byte("\n")), []byte("\r"))
	switch {
	case len(pin) == 0:
		return errors.New("the PIN is empty")
	case n > maxPIN+1:
		return fmt.Errorf("the PIN is longer than %d bytes: is this the right file?", maxPIN)
	case bytes.ContainsAny(pin, "\n\x00"):
		return errors.New("the PIN has more than one line: is this the right file?")
	}
	return use(pin)
}

// readFile reads the file of the PIN.
func (s PINSource) readFile(into []byte) (int, error) {
	path, err := s.path()
	if err != nil {
		return 0, err
	}
	forbidden := ownerOnly
	if s.Credential != "" {
		forbidden = 0o037 // systemd grants it by an ACL, whose mask shows as the group's bits
	}
	return readPrivate(path, forbidden, into, "the PIN")
}

// stamp is what changes when the PIN does, or who may read it. An environment
// variable never does.
func (s PINSource) stamp() string {
	path, err := s.path()
	if path == "" || err != nil {
		return ""
	}
	return stamp(path)
}
