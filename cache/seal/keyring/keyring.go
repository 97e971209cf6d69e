// Package keyring seals for the time until the next boot: its secret is in the
// Linux kernel's memory and survives this process, not the host's restart.
package keyring

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/cache/seal"
)

const (
	keyType     = "user"
	prefix      = "kms-agent:"
	maxName     = 128
	payloadSize = seal.SecretSize + 8

	// permissions of the key, see keyctl_setperm(3): all for a possessor, and
	// without possession view, read, write, search and link for the user alone,
	// since a service's session keyring need not lead to the user's keyring
	// (systemd's KeyringMode=private). Nothing for group and others. Whoever runs
	// as the same user can read it, as could a debugger.
	permissions = 0x3f<<24 | 0x1f<<16
)

// Sealer keeps a random secret of 256 bits and the counter in one key of type
// "user" in the user's keyring (keyrings(7)). It is one key so that the two
// cannot come apart. The type is the only one whose payload the user's own
// processes can read and which needs no other key, as "encrypted" and "trusted"
// do; payloads are never swapped. From Linux 5.3 on the keyring lasts as long as
// the user namespace, also while the user has no process.
type Sealer struct {
	name    string
	id      int // the key's serial number
	key     *seal.Key
	payload *seal.Memory // for the kernel to write and read
}

// Open finds the secret called name, or makes one. Each store needs a name of
// its own: 1 to 128 characters of a-z, A-Z, 0-9, "-", "_", ".", "/". An error
// wraps seal.ErrUnavailable and names the cure. The caller closes the sealer.
func Open(name string) (*Sealer, error) {
	if name == "" || len(name) > maxName || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./") != "" {
		return nil, fmt.Errorf("%w: kernel keyring: bad name %q", seal.ErrUnavailable, name)
	}
	s := &Sealer{name: name}
	if err := s.open(); err != nil {
		s.Close()
		return nil, fmt.Errorf("%w: %s: %w", seal.ErrUnavailable, s, err)
	}
	return s, nil
}

func (s *Sealer) open() error {
	var err error
	if s.payload, err = seal.NewMemory(payloadSize); err != nil {
		return err
	}
	s.id, err = unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, keyType, prefix+s.name, 0)
	if errors.Is(err, unix.ENOKEY) || errors.Is(err, unix.EKEYEXPIRED) || errors.Is(err, unix.EKEYREVOKED) {
		s.id, err = s.create()
	}
	if err != nil {
		return cure(err)
	}
	defer clear(s.payload.Bytes())
	if _, err := s.read(); err != nil {
		return err
	}
	s.key, err = seal.NewKey(s.payload.Bytes()[:seal.SecretSize])
	return err
}

// create makes the key in this thread's own keyring, where it may be given its
// permissions before anybody else can see it, and moves it.
func (s *Sealer) create() (int, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	payload := s.payload.Bytes()
	defer clear(payload)
	_, _ = rand.Read(payload[:seal.SecretSize])
	clear(payload[seal.SecretSize:])
	id, err := unix.AddKey(keyType, prefix+s.name, payload, unix.KEY_SPEC_THREAD_KEYRING)
	if err != nil {
		return 0, fmt.Errorf("add_key: %w", err)
	}
	if err := unix.KeyctlSetperm(id, permissions); err != nil {
		return 0, fmt.Errorf("set permissions: %w", err)
	}
	if _, err := unix.KeyctlInt(unix.KEYCTL_LINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0); err != nil {
		return 0, fmt.Errorf("link: %w", err)
	}
	if _, err := unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_THREAD_KEYRING, 0, 0); err != nil {
		return 0, fmt.Errorf("unlink: %w", err)
	}
	return id, nil
}

// read fills the payload and returns the counter in it. The caller clears it.
func (s *Sealer) read() (uint64, error) {
	payload := s.payload.Bytes()
	if payload == nil {
		return 0, errors.New("it is closed")
	}
	n, err := unix.KeyctlBuffer(unix.KEYCTL_READ, s.id, payload, 0)
	if err != nil {
		return 0, cure(fmt.Errorf("read: %w", err))
	}
	if n != payloadSize {
		return 0, fmt.Errorf("key %q holds %d bytes, not %d: something else made it: keyctl purge user %q", prefix+s.name, n, payloadSize, prefix+s.name)
	}
	return binary.BigEndian.Uint64(payload[seal.SecretSize:]), nil
}

// Close clears the secret in this process; the kernel keeps its own. The sealer
// must not be used afterwards.
func (s *Sealer) Close() {
	s.key.Free()
	s.payload.Free()
}

// Seal is seal.Sealer's.
func (s *Sealer) Seal(dst, plaintext, aad []byte) ([]byte, error) {
	return s.key.Seal(dst, plaintext, aad)
}

// Open is seal.Sealer's.
func (s *Sealer) Open(dst, sealed, aad []byte) ([]byte, error) {
	return s.key.Open(dst, sealed, aad)
}

// Counter is seal.Sealer's.
func (s *Sealer) Counter() (uint64, error) {
	defer clear(s.payload.Bytes())
	n, err := s.read()
	if err != nil {
		return 0, fmt.Errorf("%w: %s: %w", seal.ErrUnavailable, s, err)
	}
	return n, nil
}

// Advance is seal.Sealer's.
func (s *Sealer) Advance() (uint64, error) {
	defer clear(s.payload.Bytes())
	n, err := s.read()
	if err == nil {
		binary.BigEndian.PutUint64(s.payload.Bytes()[seal.SecretSize:], n+1)
		if _, err = unix.KeyctlBuffer(unix.KEYCTL_UPDATE, s.id, s.payload.Bytes(), 0); err != nil {
			err = cure(fmt.Errorf("update: %w", err))
		}
	}
	if err != nil {
		return 0, fmt.Errorf("%w: %s: %w", seal.ErrUnavailable, s, err)
	}
	return n + 1, nil
}

// String is seal.Sealer's.
func (s *Sealer) String() string {
	return "kernel keyring (until the next boot), key " + prefix + s.name
}

// cure says what to do about an error of the kernel.
func cure(err error) error {
	const other = "or use the TPM sealer, or no sealed store"
	for errno, what := range map[unix.Errno]string{
		unix.ENOSYS: "this kernel has no keyrings (CONFIG_KEYS, gVisor): use a kernel that has, " + other,
		unix.EPERM: "a seccomp filter, as container runtimes have by default, forbids it: " +
			"allow add_key and keyctl in the container's seccomp profile, " + other,
		unix.EACCES: "the key belongs to another user, or a security module forbids it: run as the user that made it, " + other,
		unix.EDQUOT: "the user's quota of kernel keys is full (/proc/key-users): raise sysctl kernel.keys.maxkeys and " +
			"kernel.keys.maxbytes, or give the agent a user of its own",
		unix.ENOKEY:      "the key was removed since: restart the agent, which then starts without its store",
		unix.EKEYREVOKED: "the key was revoked since: restart the agent, which then starts without its store",
	} {
		if errors.Is(err, errno) {
			return fmt.Errorf("%w: %s", err, what)
		}
	}
	return err
}
