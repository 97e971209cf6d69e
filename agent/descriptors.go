package agent

import (
	"fmt"
	"os"

	"github.com/coreos/go-systemd/v22/activation"
)

// Descriptors are open files that a service manager handed to this process. Each is
// known by its name.
type Descriptors []*os.File

// InheritedDescriptors returns what this process was handed by the protocol of
// sd_listen_fds(3). It takes the variables of that out of the environment, so it is
// called once.
func InheritedDescriptors() Descriptors { return activation.Files(true) }

// named returns those with these names, or why there is none.
func (d Descriptors) named(names []string) ([]*os.File, error) {
	found := make([]*os.File, 0, len(names))
	for _, name := range names {
		f, err := d.Named(name)
		if err != nil {
			return nil, err
		}
		found = append(found, f)
	}
	return found, nil
}

// Named returns the one that has this name.
func (d Descriptors) Named(name string) (*os.File, error) {
	var found *os.File
	for _, f := range d {
		switch {
		case f.Name() != name:
		case found != nil:
			return nil, fmt.Errorf("this process was handed several descriptors with the name %q: it must be one", name)
		default:
			found = f
		}
	}
	if found == nil {
		return nil, fmt.Errorf("this process was handed no descriptor %q: OpenFile=PATH:%s:read-only in the agent's systemd unit does that (systemd 253 and later)", name, name)
	}
	return found, nil
}
