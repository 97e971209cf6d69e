package host

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	selfExecutable = "/proc/self/exe"
	// maxProgram bounds what is copied to memory before it is executed.
	maxProgram = 512 << 20
	sealAll    = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
)

// errProgram is in the error of a start whose program cannot be executed, or must not.
var errProgram = errors.New("the program is not what is configured")

// program is what one supervisor executes. Each new process is the same
// program, whatever became of its file meanwhile.
type program struct {
	cfg    Config
	sealed *os.File // the checked copy, once there is one
}

// path returns what to execute.
func (p *program) path() (string, error) {
	if p.cfg.Self {
		return selfExecutable, nil
	}
	if p.sealed == nil {
		sealed, err := verified(p.cfg.Command, p.cfg.SHA256)
		if err != nil {
			return "", err
		}
		p.sealed = sealed
	}
	return "/proc/self/fd/" + strconv.Itoa(int(p.sealed.Fd())), nil
}

func (p *program) close() {
	if p.sealed != nil {
		_ = p.sealed.Close()
	}
}

// verified copies the program at path to memory that nobody can change any
// more, if its SHA-256 is want. What is executed from there is what was checked.
func verified(path, want string) (*os.File, error) {
	sum, err := hex.DecodeString(want)
	if err != nil {
		return nil, fmt.Errorf("SHA-256 of %s: %w", path, err)
	}
	program, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the plugin's program: %w", err)
	}
	defer func() { _ = program.Close() }()
	if info, err := program.Stat(); err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return nil, fmt.Errorf("%s is not an executable file", path)
	}
	sealed, err := memoryFile()
	if err != nil {
		return nil, err
	}
	if err := copyChecked(sealed, program, path, sum); err != nil {
		return nil, errors.Join(err, sealed.Close())
	}
	return sealed, nil
}

func memoryFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("plugin", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // kernels before 6.3 do not know MFD_EXEC
		fd, err = unix.MemfdCreate("plugin", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if errors.Is(err, unix.EACCES) {
		return nil, errors.New("the kernel forbids executable memory files: set the sysctl vm.memfd_noexec to 0 or 1")
	}
	if err != nil {
		return nil, fmt.Errorf("memory for the plugin's program: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	return aboveDescriptors(uintptr(fd), "plugin") // it is executed by its number
}

func copyChecked(sealed *os.File, program io.Reader, path string, want []byte) error {
	hash := sha256.New()
	head := &headWriter{}
	n, err := io.Copy(io.MultiWriter(sealed, hash, head), io.LimitReader(program, maxProgram+1))
	switch {
	case err != nil:
		return fmt.Errorf("copy %s to memory: %w", path, err)
	case n > maxProgram:
		return fmt.Errorf("%s is longer than %d bytes", path, maxProgram)
	}
	if got := hash.Sum(nil); subtle.ConstantTimeCompare(got, want) != 1 {
		return fmt.Errorf("the SHA-256 of %s is %x, the configuration says %x: it is not executed; "+
			"configure the new digest if the program was replaced on purpose", path, got, want)
	}
	if string(head.bytes) != "\x7fELF" {
		return fmt.Errorf("%s is not a native program: scripts cannot be executed from what was checked", path)
	}
	if _, err := unix.FcntlInt(sealed.Fd(), unix.F_ADD_SEALS, sealAll); err != nil {
		return fmt.Errorf("seal the copy of %s: %w", path, err)
	}
	return nil
}

// headWriter keeps the first four bytes.
type headWriter struct{ bytes []byte }

func (h *headWriter) Write(p []byte) (int, error) {
	if missing := 4 - len(h.bytes); missing > 0 {
		h.bytes = append(h.bytes, p[:min(missing, len(p))]...)
	}
	return len(p), nil
}
