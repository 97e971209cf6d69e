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
	// Descriptor is an open file of this process.
	Descriptor *PINDescriptor
}

// String says where the PIN is.
func (s PINSource) String() string {
	switch {
	case s.Descriptor != nil:
		return "descriptor " + s.Descriptor.name
	case s.Variable != "":
		return "environment variable " + s.Variable
	case s.Credential != "":
		return "credential " + s.Credential
	default:
		return s.File
	}
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
	n, err := s.copyTo(memory)
	if err != nil {
		return err
	}
	pin := bytes.TrimSuffix(bytes.TrimSuffix(memory[:n], []byte("\n")), []byte("\r"))
	switch {
	case len(pin) == 0:
		return fmt.Errorf("the PIN is empty: %v", s)
	case n > maxPIN+1:
		return fmt.Errorf("the PIN is longer than %d bytes: is %v the right place?", maxPIN, s)
	case bytes.ContainsAny(pin, "\n\x00"):
		return fmt.Errorf("the PIN has more than one line: is %v the right place?", s)
	}
	return use(pin)
}

// Check tells whether there is something that can be a PIN. No token is asked.
func (s PINSource) Check() error { return s.read(func([]byte) error { return nil }) }

func (s PINSource) copyTo(memory slab) (int, error) {
	switch {
	case s.Descriptor != nil:
		return s.Descriptor.copyTo(memory)
	case s.Variable != "":
		value, ok := os.LookupEnv(s.Variable)
		if !ok {
			return 0, fmt.Errorf("the environment variable %s, which should hold the PIN, is not set", s.Variable)
		}
		return copy(memory, value), nil
	default:
		return s.readFile(memory)
	}
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
	if s.Descriptor != nil {
		return s.Descriptor.stamp()
	}
	path, err := s.path()
	if path == "" || err != nil {
		return ""
	}
	return stamp(path)
}
