package plugins

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// DescriptorsVariable is the environment variable that names the descriptors which the
// agent hands to a plugin, from firstDescriptor on, divided by colons.
const DescriptorsVariable = "KMS_AGENT_PLUGIN_DESCRIPTORS"

// firstDescriptor is the first that a plugin is handed.
const firstDescriptor = 3

// Descriptor returns the descriptor that the agent hands to this process under a name,
// because the configuration lists it in descriptors of the backend. Each call returns a
// file of its own, which shares the offset with the others: read it with ReadAt.
func Descriptor(name string) (*os.File, error) {
	i := slices.Index(descriptors(), name)
	if i < 0 || name == "" {
		return nil, fmt.Errorf("no descriptor %q is handed to this process: name it in descriptors of the backend, beside its settings", name)
	}
	fd, err := unix.FcntlInt(uintptr(firstDescriptor+i), unix.F_DUPFD_CLOEXEC, firstDescriptor)
	if err != nil {
		return nil, fmt.Errorf("descriptor %q: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func descriptors() []string {
	value := os.Getenv(DescriptorsVariable)
	if value == "" {
		return nil
	}
	return strings.Split(value, ":")
}

// keepDescriptors keeps what this process was handed out of the processes that it
// starts, or that a vendor's library does.
func keepDescriptors() {
	for i := range descriptors() {
		unix.CloseOnExec(firstDescriptor + i)
	}
}
