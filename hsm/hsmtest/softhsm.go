package hsmtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/miekg/pkcs11"
)

// The token that NewSoftHSM makes.
const (
	SoftHSMModule = "/usr/lib/softhsm/libsofthsm2.so"
	Label         = "kms"
	PIN           = "a user's PIN" // any text is a PIN
	OfficerPIN    = "officer-1"
)

// SoftHSM is a token of SoftHSM in a directory of its own. It belongs to one test.
type SoftHSM struct {
	t   testing.TB
	dir string
}

// NewSoftHSM makes a token, which is gone when the test ends. The environment of the
// test tells SoftHSM where it is, so a test that has one cannot be parallel.
func NewSoftHSM(t testing.TB) *SoftHSM {
	t.Helper()
	if _, err := os.Stat(SoftHSMModule); err != nil {
		t.Fatalf("SoftHSM is not installed (make deps): %v", err)
	}
	dir, err := os.MkdirTemp("", "hsm") // SoftHSM takes no "=" in a path, t.TempDir may have one
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &SoftHSM{t: t, dir: dir}
	if err := os.Mkdir(s.Tokens(), 0o700); err != nil {
		t.Fatal(err)
	}
	s.Write("softhsm2.conf", fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", s.Tokens()))
	s.Write("pin", PIN+"\n")
	t.Setenv("SOFTHSM2_CONF", s.Path("softhsm2.conf"))
	s.Run("softhsm2-util", "--init-token", "--free", "--label", Label, "--so-pin", OfficerPIN, "--pin", PIN)
	return s
}

// Dir is where everything of the token is; a test may put more there.
func (s *SoftHSM) Dir() string { return s.dir }

// Path is that of a file in Dir.
func (s *SoftHSM) Path(name string) string { return filepath.Join(s.dir, name) }

// Tokens is the directory of the token's objects. Without it the token is away.
func (s *SoftHSM) Tokens() string { return s.Path("tokens") }

// PINFile is a file with PIN and a newline, as an editor leaves it.
func (s *SoftHSM) PINFile() string { return s.Path("pin") }

// Env is the environment for processes that do not have that of the test.
func (s *SoftHSM) Env() []string { return []string{"SOFTHSM2_CONF=" + s.Path("softhsm2.conf")} }

// Write writes a file in Dir.
func (s *SoftHSM) Write(name, content string) {
	s.t.Helper()
	if err := os.WriteFile(s.Path(name), []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// Run runs a program that has to succeed.
func (s *SoftHSM) Run(name string, args ...string) {
	s.t.Helper()
	if out, err := exec.CommandContext(s.t.Context(), name, args...).CombinedOutput(); err != nil { //nolint:gosec // what the test says
		s.t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// Tool runs pkcs11-tool, logged in, as another application of the token.
func (s *SoftHSM) Tool(args ...string) {
	s.t.Helper()
	s.Run("pkcs11-tool", slices.Concat([]string{"--module", SoftHSMModule, "--token-label", Label, "--login", "--pin", PIN}, args)...)
}

// LogOut ends the login of all sessions of this process with a token, as another part of the
// process would.
func LogOut(t testing.TB, library *pkcs11.Ctx, slot uint) {
	t.Helper()
	session, err := library.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
	if err == nil {
		err = library.Logout(session)
	}
	if err == nil {
		err = library.CloseSession(session)
	}
	if err != nil {
		t.Fatal(err)
	}
}
