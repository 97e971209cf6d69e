package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/quota"
)

// Check is what CheckConfig found.
type Check struct {
	// Config is what was checked; nil where the file itself has faults. One that
	// was checked for another host is not to be run: its users and groups may be
	// others here.
	Config *Config
	// Faults keep the agent, or one of its backends, from starting, or can never work.
	Faults Faults
	// Warnings do not, but something will not work, or is not as safe as meant.
	Warnings Faults

	places map[string]location
}

// Add adds a fault, or a warning, that somebody else found at a path.
func (c *Check) Add(warning bool, path, message string) {
	to := &c.Faults
	if warning {
		to = &c.Warnings
	}
	d := &document{file: c.Config.files[0], places: c.places}
	d.report(path, "%s", message)
	*to = append(*to, d.faults...).sorted()
}

// CheckConfig checks a configuration as ParseConfig does and, where that finds
// no fault, whether what it names is there and can be used by the user of this
// process: directories, files, sockets, keystores, programs, accounts. It
// changes nothing, and touches neither the network nor a running agent.
//
// With elsewhere the configuration is of another host: nothing that it names is
// looked at, but for policy files, which are a part of it.
func CheckConfig(name string, data []byte, elsewhere bool) Check {
	l := newLoader(name, data, "", elsewhere)
	if faults := l.faults(); faults != nil {
		return Check{Faults: faults}
	}
	h := &hostCheck{cfg: l.cfg, faults: l.main, warnings: &document{file: name, places: l.main.places}}
	h.grace()
	h.store()
	if !elsewhere {
		h.run()
	}
	return Check{Config: l.cfg, Faults: h.faults.faults.sorted(), Warnings: h.warnings.faults.sorted(), places: l.main.places}
}

// hostCheck looks at what a configuration without faults names on this host.
type hostCheck struct {
	cfg              *Config
	faults, warnings *document
}

func (h *hostCheck) fault(path, format string, a ...any) { h.faults.report(path, format, a...) }
func (h *hostCheck) warn(path, format string, a ...any)  { h.warnings.report(path, format, a...) }

func (h *hostCheck) run() {
	h.ownDirectory("state_dir", h.cfg.StateDir)
	h.counts()
	h.sealer()
	h.ownDirectory("runtime_dir", h.cfg.RuntimeDir)
	h.socket("listen.native.socket", h.cfg.Listen.Native.Socket)
	h.socket("admin.socket", h.cfg.Admin.Socket)
	h.wayToSocket()
	h.socketGroup()
	h.workloadAPI()
	h.auditFile("audit.file", h.cfg.Audit.File)
	h.auditSinks()
	h.initialKey()
	for i := range h.cfg.Backends {
		h.backend(fmt.Sprintf("backends[%d]", i), &h.cfg.Backends[i])
	}
}

// grace warns of limits that end in the midst of an outage what its grace promises.
func (h *hostCheck) grace() {
	for i, k := range h.cfg.Keys {
		at := fmt.Sprintf("keys[%d].", i)
		if k.Cache.MaxIdle < max(k.Grace.Encrypt, k.Grace.Decrypt) {
			h.warn(at+"cache.max_idle", "is shorter than the key's grace: data keys that are not in use are dropped before an outage that they could outlive; make it longer")
		}
		if k.Grace.Encrypt > 0 && k.Cache.Spares == 0 {
			h.warn(at+"grace.encrypt", "without cache.spares nothing is encrypted any more when the data key reaches a limit in an outage; set cache.spares to 1 or more")
		}
		if n := len(k.wraps()); n > 1 && k.MinWraps == n {
			h.warn(at+"min_wraps", "is as many as there are wrapping keys: while one backend is away no new data key is made, and nothing is encrypted when those at hand are used up; make it smaller, or accept that")
		}
		if len(k.Prewarm) > 0 && k.Grace.Decrypt == 0 {
			h.warn(at+"prewarm", "without grace.decrypt what is held ready serves for max_age in an outage and no longer; set grace.decrypt")
		}
	}
}

// ownDirectory tests a directory that the agent makes where it is missing.
func (h *hostCheck) ownDirectory(path, dir string) {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		h.directory(path, dir)
		return
	}
	above := filepath.Dir(dir)
	for above != "/" {
		if _, err := os.Stat(above); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		above = filepath.Dir(above)
	}
	if !permitted(above, unix.W_OK|unix.X_OK) {
		h.fault(path, "%s does not exist, and uid %d cannot make it in %s; make it: %s", dir, os.Geteuid(), above, makeDirectory(dir))
	}
}

// counts tests what is left of the counts of daily limits.
func (h *hostCheck) counts() {
	if info, err := os.Stat(h.cfg.StateDir); err != nil || !info.IsDir() {
		return // told already
	}
	if err := quota.Check(h.cfg.StateDir); err != nil {
		h.fault("state_dir", "%v", err)
	}
}

// directory tests a directory in which the agent makes files, and says whether
// it is good.
func (h *hostCheck) directory(path, dir string) bool {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && h.made(dir):
		return true
	case errors.Is(err, fs.ErrNotExist):
		h.fault(path, "the directory %s does not exist; make it: %s", dir, makeDirectory(dir))
	case err != nil:
		h.fault(path, "the directory %s cannot be looked at: %v; let uid %d pass", dir, bare(err), os.Geteuid())
	case !info.IsDir():
		h.fault(path, "%s is not a directory; move it away, or name another place", dir)
	case !permitted(dir, unix.W_OK|unix.X_OK):
		h.fault(path, "uid %d cannot make files in %s (%v); give it to the agent's user, as with chown %d %s",
			os.Geteuid(), dir, info.Mode(), os.Geteuid(), dir)
	case info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0:
		h.fault(path, "everybody may replace files in %s (%v); run chmod o-w %s", dir, info.Mode(), dir)
	default:
		return true
	}
	return false
}

// made says whether the agent makes a missing directory when it starts.
func (h *hostCheck) made(dir string) bool {
	return slices.ContainsFunc([]string{h.cfg.StateDir, h.cfg.RuntimeDir}, func(own string) bool {
		return own == dir || strings.HasPrefix(own, strings.TrimSuffix(dir, "/")+"/")
	})
}

func makeDirectory(dir string) string {
	return fmt.Sprintf("install -d -m 0700 -o %d %s", os.Geteuid(), dir)
}

func (h *hostCheck) socket(path, socket string) {
	if !h.directory(path, filepath.Dir(socket)) {
		return
	}
	info, err := os.Lstat(socket)
	if err != nil {
		return
	}
	if info.Mode().Type() != fs.ModeSocket {
		h.fault(path, "%s is there and is no socket; move it away, or name another path", socket)
		return
	}
	if owner := ownerOf(socket); owner != os.Geteuid() {
		h.fault(path, "%s belongs to uid %d, and uid %d cannot replace it; remove it, or run as its owner", socket, owner, os.Geteuid())
	}
}

// wayToSocket warns where the socket's mode lets callers in that its directory
// keeps out.
func (h *hostCheck) wayToSocket() {
	const others, group = 0o001, 0o010
	native := h.cfg.Listen.Native
	if native.Mode&0o022 == 0 {
		return
	}
	dir := filepath.Dir(native.Socket)
	var stat unix.Stat_t
	if err := unix.Stat(dir, &stat); err != nil {
		return // the agent makes it so that callers pass through
	}
	if stat.Mode&others != 0 || (stat.Mode&group != 0 && native.Mode&0o002 == 0 && native.Group != nil && uint32(*native.Group) == stat.Gid) {
		return
	}
	h.warn("listen.native.mode", "lets other users connect (%04o), but the socket's directory %s has mode %04o: they do not get to the socket; "+
		"give it mode 0711 (RuntimeDirectory= and RuntimeDirectoryMode=0711 in a systemd unit)",
		native.Mode.FileMode(), dir, stat.Mode&0o7777)
}

// socketGroup tests that the agent may give its socket away to the group.
func (h *hostCheck) socketGroup() {
	group := h.cfg.Listen.Native.Group
	if group == nil || int(*group) == os.Getegid() || mayChown() {
		return
	}
	if mine, err := os.Getgroups(); err == nil && !slices.Contains(mine, int(*group)) {
		h.fault("listen.native.group", "uid %d is not a member of group %d and cannot give it the socket; "+
			"add it to the group (SupplementaryGroups= in a systemd unit)", os.Geteuid(), *group)
	}
}

// mayChown says whether this process has CAP_CHOWN.
func mayChown() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_CHOWN) != 0
}

func (h *hostCheck) workloadAPI() {
	const path = "identity.workload_api"
	socket, ok := strings.CutPrefix(h.cfg.Identity.WorkloadAPI, "unix://")
	if !ok {
		return
	}
	info, err := os.Stat(socket)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		h.warn(path, "%s is not there: until the Workload API runs, callers with SVIDs are refused; start it, or correct the path", socket)
	case err != nil:
		h.warn(path, "%s cannot be looked at: %v; let uid %d pass", socket, bare(err), os.Geteuid())
	case info.Mode().Type() != fs.ModeSocket:
		h.warn(path, "%s is no socket; write the path of the Workload API's", socket)
	case !permitted(socket, unix.W_OK):
		h.warn(path, "uid %d may not connect to %s (%v); let it, or its group", os.Geteuid(), socket, info.Mode())
	}
}

// auditSinks tests where records go besides. A file is made at the first record;
// a syslog daemon may start later.
func (h *hostCheck) auditSinks() {
	c := h.cfg.Audit
	sockets := map[string]string{"audit.checkpoints.syslog": c.Checkpoints.Syslog}
	h.auditFile("audit.checkpoints.file", c.Checkpoints.File)
	for i, s := range c.Sinks {
		path := fmt.Sprintf("audit.sinks[%d].", i)
		h.auditFile(path+"file", s.File)
		sockets[path+"syslog"] = s.Syslog
	}
	for path, socket := range sockets {
		if socket == "" {
			continue
		}
		info, err := os.Stat(socket)
		switch {
		case err != nil:
			h.warn(path, "%s cannot be looked at: %v; start the syslog daemon, or correct the path", socket, bare(err))
		case info.Mode().Type() != fs.ModeSocket:
			h.warn(path, "%s is no socket; write that of a syslog daemon, such as /dev/log", socket)
		case !permitted(socket, unix.W_OK):
			h.warn(path, "uid %d may not connect to %s (%v); let it, or its group", os.Geteuid(), socket, info.Mode())
		}
	}
}

func (h *hostCheck) auditFile(path, file string) {
	if file == "" || file == audit.Stdout || !h.directory(path, filepath.Dir(file)) {
		return
	}
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		h.fault(path, "%s cannot be looked at: %v", file, bare(err))
	case info.IsDir():
		h.fault(path, "%s is a directory; write the path of a file", file)
	case !permitted(file, unix.R_OK|unix.W_OK):
		h.fault(path, "uid %d cannot write %s (%v); give it to the agent's user, as with chown %d %s",
			os.Geteuid(), file, info.Mode(), os.Geteuid(), file)
	case path == "audit.file" && info.Mode().IsRegular() && info.Size() > 0 && !audit.HasState(h.cfg.StateDir):
		h.fault(path, "%s has records, and the state of its chain is not in %s; restore the state directory, or move the log and its initial key away, "+
			"and a new chain begins", file, h.cfg.StateDir)
	}
}

// initialKey tests the first key of the chain. It is needed where a chain
// begins; elsewhere it may have been moved to where logs are verified.
func (h *hostCheck) initialKey() {
	const path = "audit.initial_key"
	key, report := h.cfg.Audit.InitialKey, h.fault
	if log, err := os.Stat(h.cfg.Audit.File); err == nil && log.Size() > 0 {
		report = h.warn
	}
	info, err := os.Stat(key)
	if errors.Is(err, fs.ErrNotExist) {
		if log, err := os.Stat(h.cfg.Audit.File); err != nil || log.Size() == 0 {
			h.directory(path, filepath.Dir(key))
		}
		return
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile(key)
	}
	if err != nil {
		report(path, "%s cannot be read: %v; give it to uid %d, or name another path", key, bare(err), os.Geteuid())
		return
	}
	_, err = audit.ParseInitialKey(text)
	clear(text)
	if err != nil {
		report(path, "%s: %v; move it away, and the agent makes one with a new chain", key, err)
		return
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		h.warn(path, "others have access to %s (%04o), and who reads it can forge records; run chmod 600 %s", key, mode, key)
	}
}

// permitted says whether this process's effective user has the rights.
func permitted(path string, rights uint32) bool {
	return unix.Faccessat(unix.AT_FDCWD, path, rights, unix.AT_EACCESS) == nil
}

func ownerOf(path string) int {
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return -1
	}
	return int(stat.Uid)
}

// bare leaves out the path, which the message names already.
func bare(err error) error {
	var inPath *fs.PathError
	if errors.As(err, &inPath) {
		return inPath.Err
	}
	return err
}
