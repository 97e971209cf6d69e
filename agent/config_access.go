package agent

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/kms-agent/kms-agent/plugins/host"
)

// Confinement says whether a plugin is kept to what access names.
type Confinement string

// UnmarshalText refuses any other word.
func (c *Confinement) UnmarshalText(text []byte) error {
	if string(text) == "best-effort" {
		*c = Confinement(host.ConfineWhereKnown)
		return nil
	}
	return oneOf(c, string(text), Confinement(host.ConfineAlways), Confinement(host.ConfineNever), "best-effort")
}

// String returns the word of the configuration.
func (c Confinement) String() string {
	if c == Confinement(host.ConfineWhereKnown) {
		return "best-effort"
	}
	return string(c)
}

// AccessConfig names what a confined plugin reaches beyond the system's programs
// and libraries, name resolution, certificates and its own socket.
type AccessConfig struct {
	// Read, Write and Sockets are files, or directories with all below.
	Read    []string `yaml:"read"`
	Write   []string `yaml:"write"`
	Sockets []string `yaml:"sockets"`
	// ConnectTCP are ports to connect to; "*" is every port.
	ConnectTCP []Port `yaml:"connect_tcp"`
}

// Port is a TCP port, or 0 for every one.
type Port uint16

// UnmarshalText reads 1 to 65535 or "*".
func (p *Port) UnmarshalText(text []byte) error {
	if string(text) == "*" {
		*p = 0
		return nil
	}
	n, err := strconv.ParseUint(string(text), 10, 16)
	if err != nil || n == 0 {
		return fmt.Errorf(`%s is not a port; write a number from 1 to 65535, or "*" for every port`, quote(string(text)))
	}
	*p = Port(n)
	return nil
}

func (c AccessConfig) access() host.Access {
	a := host.Access{Read: slices.Clone(c.Read), Write: slices.Clone(c.Write), Sockets: slices.Clone(c.Sockets)}
	for _, p := range c.ConnectTCP {
		if p == 0 {
			a.Network = true
			continue
		}
		a.ConnectTCP = append(a.ConnectTCP, uint16(p))
	}
	return a
}

func (l *loader) validateAccess(at string, c AccessConfig) {
	for name, paths := range map[string][]string{"read": c.Read, "write": c.Write, "sockets": c.Sockets} {
		for i, path := range paths {
			if !filepath.IsAbs(path) || filepath.Clean(path) == "/" {
				l.report(fmt.Sprintf("%s.%s[%d]", at, name, i), "must be an absolute path below /, a file or a directory; confine: off gives everything")
			}
		}
	}
}
