// Package tpm seals for one TPM 2.0: its secret and its counter survive the
// host's restart and leave the host never.
package tpm

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/kms-agent/kms-agent/cache/seal"
)

// DefaultDevice is the TPM behind the kernel's resource manager, which keeps
// apart the programs that use it.
const DefaultDevice = "/dev/tpmrm0"

// The NV indices that may hold the counter: those that the TCG's registry of
// reserved handles leaves to the owner.
const (
	FirstIndex   = 0x01800000
	LastIndex    = 0x01bfffff
	DefaultIndex = 0x01804b41
)

// Config says which TPM.
type Config struct {
	// Device is a TPM's device file, or a Unix socket that takes its commands,
	// such as swtpm's. Empty is DefaultDevice.
	Device string
	// Index is the counter's NV index, from FirstIndex to LastIndex. Each store
	// on a host needs its own. Zero is DefaultIndex.
	Index uint32
}

// Sealer seals under a random secret of 256 bits, which itself is sealed in the
// TPM: an object below the storage primary key (ECC P-256, made from the owner's
// seed by the TCG's template whenever it is needed, never made persistent).
// What Seal returns begins with that object, so that the TPM stores nothing but
// the counter. The object is bound to this TPM, not to PCR values, so that new
// firmware or a new kernel does not cost the store. It needs no authorization
// and is exempt from dictionary-attack protection, and so is the counter: the
// sealer can neither cause a lockout nor suffer from one. The owner's
// authorization must be empty, as Linux leaves it.
//
// The counter is an NV counter, written by each Advance and by nothing else. It
// is not an orderly one: those skip after a power failure, which would cost the
// store. A counter that is deleted and made again begins above every value that
// the TPM has ever counted to, so that this is no way back.
//
// The secret crosses the wire to the TPM encrypted against listeners, by sessions
// salted to the primary key. The TPM library leaves copies on the Go heap, which
// only builds with GOEXPERIMENT=runtimesecret erase. A call to the TPM ends by
// the deadlines of the kernel's driver.
type Sealer struct {
	config Config
	tpm    transport.TPMCloser // nil: closed
	key    *seal.Key
	object []byte // the sealed secret that key is of, as Seal puts it in front
}

// Open connects to the TPM, makes the counter where there is none, and tries
// both. An error wraps seal.ErrUnavailable and names the cure. The caller closes
// the sealer.
func Open(c Config) (*Sealer, error) {
	if c.Device == "" {
		c.Device = DefaultDevice
	}
	if c.Index == 0 {
		c.Index = DefaultIndex
	}
	s := &Sealer{config: c}
	if err := s.open(); err != nil {
		s.Close()
		return nil, s.unavailable(err)
	}
	return s, nil
}

func (s *Sealer) open() error {
	if s.config.Index < FirstIndex || s.config.Index > LastIndex {
		return fmt.Errorf("NV index %#x: use one from %#x to %#x", s.config.Index, FirstIndex, LastIndex)
	}
	var err error
	s.tpm, err = linuxtpm.Open(s.config.Device)
	if errors.Is(err, linuxtpm.ErrFileIsNotDevice) {
		s.tpm, err = linuxudstpm.Open(s.config.Device)
	}
	if err != nil {
		s.tpm = nil // not a nil pointer in an interface
		return err
	}
	if err := s.prepareCounter(); err != nil {
		return err
	}
	_, err = s.read()
	return err
}

// Close clears the secret and leaves the TPM. The sealer must not be used
// afterwards.
func (s *Sealer) Close() {
	s.forget()
	if s.tpm != nil {
		_ = s.tpm.Close()
		s.tpm = nil
	}
}

func (s *Sealer) forget() {
	s.key.Free()
	s.key, s.object = nil, nil
}

// Seal is seal.Sealer's. The first call makes a secret, unless Open has
// found one in a store; the TPM is asked for nothing after that.
func (s *Sealer) Seal(dst, plaintext, aad []byte) ([]byte, error) {
	if s.key == nil {
		if err := s.create(); err != nil {
			return nil, s.unavailable(err)
		}
	}
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(s.object)))
	return s.key.Seal(append(dst, s.object...), plaintext, aad)
}

// Open is seal.Sealer's. It asks the TPM when the secret is another one than
// that of the call before.
func (s *Sealer) Open(dst, sealed, aad []byte) ([]byte, error) {
	if len(sealed) < 2 || int(binary.BigEndian.Uint16(sealed)) > min(maxObject, len(sealed)-2) {
		return nil, fmt.Errorf("%w: no sealed secret", seal.ErrDamaged)
	}
	end := 2 + int(binary.BigEndian.Uint16(sealed))
	object := sealed[2:end]
	if s.key == nil || string(object) != string(s.object) {
		if err := s.unseal(object); err != nil {
			return nil, err
		}
	}
	return s.key.Open(dst, sealed[end:], aad)
}

// String is seal.Sealer's.
func (s *Sealer) String() string {
	return fmt.Sprintf("TPM %s, counter at NV index %#x", s.config.Device, s.config.Index)
}

func (s *Sealer) unavailable(err error) error {
	return fmt.Errorf("%w: %s: %w", seal.ErrUnavailable, s, cure(err))
}

// create makes a new secret.
func (s *Sealer) create() (err error) {
	erasing(func() {
		secret := make([]byte, seal.SecretSize)
		defer clear(secret)
		_, _ = rand.Read(secret)
		var object []byte
		if object, err = s.sealSecret(secret); err == nil {
			err = s.use(secret, object)
		}
	})
	return err
}

func (s *Sealer) use(secret, object []byte) error {
	key, err := seal.NewKey(secret)
	if err != nil {
		return err
	}
	s.forget()
	s.key, s.object = key, append([]byte(nil), object...)
	return nil
}

// unseal makes the secret in object the one in use.
func (s *Sealer) unseal(object []byte) (err error) {
	erasing(func() {
		var secret []byte
		if secret, err = s.unsealSecret(object); err == nil {
			err = s.use(secret, object)
		}
		clear(secret)
	})
	switch {
	case errors.Is(err, errObject):
		return fmt.Errorf("%w: %w", seal.ErrDamaged, err)
	case errors.Is(err, errNotOurs):
		return fmt.Errorf("%w: %s cannot load it: it was made by another TPM, or this one was cleared since", seal.ErrForeign, s)
	case err != nil:
		return s.unavailable(err)
	}
	return nil
}

var errClosed = errors.New("it is closed")

// cure says what to do about an error.
func cure(err error) error {
	what := ""
	switch {
	case errors.Is(err, fs.ErrNotExist):
		what = "this host has no TPM 2.0, or its driver is not loaded: turn it on in the firmware, or use the kernel keyring sealer"
	case errors.Is(err, fs.ErrPermission):
		what = "let the agent's user use it (group tss: systemd SupplementaryGroups=tss), and its unit see it (DeviceAllow=)"
	case errors.Is(err, tpm2.TPMRCNVSpace):
		what = "the TPM has no room for a counter: remove one that nothing uses (tpm2_getcap handles-nv-index, tpm2_nvundefine)"
	case errors.Is(err, tpm2.TPMRCBadAuth), errors.Is(err, tpm2.TPMRCAuthFail):
		what = "the owner's authorization is not empty: clear it (tpm2_changeauth -c owner), or use the kernel keyring sealer"
	case errors.Is(err, tpm2.TPMRCNVRate), errors.Is(err, tpm2.TPMRCRetry):
		what = "the TPM is busy protecting its memory: save less often"
	default:
		return err
	}
	return fmt.Errorf("%w: %s", err, what)
}
