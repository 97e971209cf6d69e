package host

import (
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// MaxDescriptors is how many descriptors a plugin is handed at most.
	MaxDescriptors = 16
	// firstDescriptor follows standard input, output and error.
	firstDescriptor = 3
)

// aboveDescriptors returns another descriptor of the same file, whose number none of
// those takes that a plugin is handed. Between fork and exec they are put to the
// numbers that they have in the plugin, over whatever had them: the program, which is
// executed by its number, or one that is still to be put to its own.
func aboveDescriptors(fd uintptr, name string) (*os.File, error) {
	above, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, firstDescriptor+MaxDescriptors)
	if err != nil {
		return nil, fmt.Errorf("another descriptor of %s: %w", name, err)
	}
	return os.NewFile(uintptr(above), name), nil
}

// handOver makes a process inherit descriptors, and know them by their names. The
// caller closes cmd.ExtraFiles.
func handOver(cmd *exec.Cmd, descriptors []*os.File) error {
	names := make([]string, 0, len(descriptors))
	for _, d := range descriptors {
		above, err := aboveDescriptors(d.Fd(), d.Name())
		if err != nil {
			closeAll(cmd.ExtraFiles)
			return err
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, above)
		names = append(names, d.Name())
	}
	if len(names) > 0 {
		cmd.Env = append(cmd.Env, plugins.DescriptorsVariable+"="+strings.Join(names, ":"))
	}
	return nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
