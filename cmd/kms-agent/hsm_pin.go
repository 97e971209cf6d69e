package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/kms-agent/kms-agent/agent"
	"github.com/kms-agent/kms-agent/plugins"
)

// noPINFD is --pin-fd when it is not given.
const noPINFD = -1

// pinFD is the name under which the plugin gets what --pin-fd names.
const pinFD = "--pin-fd"

// inheritedFD returns the descriptor that --pin-fd names. This process does not read
// it: the PIN goes from whoever wrote it to the plugin.
func inheritedFD(n int) (*os.File, error) {
	const example = "kms-agent hsm list --pin-fd 3 3</run/pin, or 3< <(command)"
	if n < 0 {
		return nil, usagef("--pin-fd %d is no descriptor; use it as in %s", n, example)
	}
	flags, err := unix.FcntlInt(uintptr(n), unix.F_GETFD, 0)
	if err != nil || n > 2 && flags&unix.FD_CLOEXEC != 0 { // what this process opened itself is closed on exec
		return nil, usagef("descriptor %d, which --pin-fd names, is not open; use it as in %s", n, example)
	}
	if term.IsTerminal(n) {
		return nil, usagef("descriptor %d, which --pin-fd names, is a terminal, which would show the PIN; use a file or a pipe, as in %s", n, example)
	}
	if mode, err := unix.FcntlInt(uintptr(n), unix.F_GETFL, 0); err != nil || mode&unix.O_ACCMODE == unix.O_WRONLY {
		return nil, usagef("descriptor %d, which --pin-fd names, cannot be read; use it as in %s", n, example)
	}
	unix.CloseOnExec(n)
	return os.NewFile(uintptr(n), pinFD), nil
}

// handOver makes the plugin inherit files, and know them by their names.
func handOver(cmd *exec.Cmd, files []*os.File) {
	if len(files) == 0 {
		return
	}
	names := make([]string, len(files))
	for i, f := range files {
		names[i] = f.Name()
	}
	cmd.ExtraFiles = append(files, cmd.ExtraFiles...) // they begin with the first that follows standard error
	cmd.Env = append(cmd.Env, plugins.DescriptorsVariable+"="+strings.Join(names, ":"))
}

// handed returns what the plugin of a configured backend is handed, and its settings.
func (f *hsmFlags) handed(b *agent.BackendConfig) ([]*os.File, json.RawMessage, error) {
	if f.pinFD != noPINFD {
		file, err := inheritedFD(f.pinFD)
		if err != nil {
			return nil, nil, err
		}
		settings, err := withPINFD(json.RawMessage(b.Settings))
		return []*os.File{file}, settings, err
	}
	var files []*os.File
	mine := agent.InheritedDescriptors()
	for _, name := range b.Descriptors {
		file, err := mine.Named(name)
		if err != nil {
			return nil, nil, &codedError{
				code: exitUsage, err: errors.New("the configuration has the PIN in a descriptor of the agent's, which this process has not"),
				hint: fmt.Sprintf("give it with --pin-fd N, or start this command by systemd-run --pipe -p OpenFile=PATH:%s:read-only", name),
			}
		}
		files = append(files, file)
	}
	return files, json.RawMessage(b.Settings), nil
}

// withPINFD are settings that have the PIN in what --pin-fd names.
func withPINFD(settings json.RawMessage) (json.RawMessage, error) {
	var all map[string]json.RawMessage
	if err := json.Unmarshal(settings, &all); err != nil {
		return nil, fmt.Errorf("settings of the backend: %w", err)
	}
	for _, name := range []string{"pin_file", "pin_credential", "pin_variable"} {
		delete(all, name)
	}
	all["pin_descriptor"] = json.RawMessage(`"` + pinFD + `"`)
	return json.Marshal(all)
}
