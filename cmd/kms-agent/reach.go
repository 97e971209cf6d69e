package main

import (
	"errors"
	"io/fs"
	"os"
	"regexp"
	"strings"

	"google.golang.org/grpc/codes"
)

// The hints for what is out of reach.
const (
	hintUnreachable = "is the agent running, and is this its socket? Name it with --socket or KMS_AGENT_SOCKET"
	hintForbidden   = "this user may not connect: see the modes of the socket (listen.native in the agent's configuration) and of its directory"
	hintWorkloadAPI = "is the SPIRE agent running, and is this its socket? Name it with --workload-api or SPIFFE_ENDPOINT_SOCKET; --identity peer does without"
	hintHandshake   = "agent and caller must trust each other's identities: compare --agent-id, the Workload API and the agent's trust domain"
	hintNoSocket    = "name the agent's socket with --socket or KMS_AGENT_SOCKET, of an administrator's command with --admin-socket or KMS_AGENT_ADMIN_SOCKET"
	hintOtherDoor   = "this is not the socket for this command: workloads use the one of listen.native (--socket), administrators that of admin (--admin-socket)"
)

// noAgent begins what is said of an agent that is out of reach.
const noAgent = "cannot reach the agent: "

// handshakeFailed is what gRPC writes before the reason of a failed handshake.
const handshakeFailed = "authentication handshake failed: "

// unanswered says what is wrong where nobody answered, or somebody else: code is
// the connection's, message gRPC's. Other codes leave f
// as it is.
func unanswered(f failure, code codes.Code, message string) failure {
	what := noSocket(message)
	switch {
	case code == codes.Unavailable && what != "":
		f.code, f.message, f.hint = exitInvalid, noAgent+what, hintNoSocket
	case code == codes.Unavailable && strings.Contains(message, "connect: permission denied"):
		f.code, f.message, f.hint = exitDenied, unreachable(message), hintForbidden
	case code == codes.Unavailable && strings.Contains(message, handshakeFailed):
		_, why, _ := strings.Cut(message, handshakeFailed)
		f.code, f.message, f.hint = exitDenied, "the connection was refused: "+strings.ReplaceAll(strings.TrimSuffix(why, `"`), `\"`, `"`), hintHandshake
	case code == codes.Unavailable:
		f.message, f.hint = unreachable(message), hintUnreachable
	case code == codes.Unimplemented && strings.HasPrefix(message, "unknown service "):
		f.code, f.message, f.hint = exitInvalid, "the socket does not know this command: "+message, hintOtherDoor
	case code == codes.DeadlineExceeded:
		f.message, f.hint = "no answer in time", "allow more time with --timeout; kms-agent status says whether the agent is well"
	}
	return f
}

// refusedDial is what a connection says that a path refused: a socket to which nobody
// listens, or what is no socket at all.
var refusedDial = regexp.MustCompile(`dial unix (.+): connect: connection refused`)

// noSocket says what a path is that refused a connection and is no socket, else "".
func noSocket(message string) string {
	found := refusedDial.FindStringSubmatch(message)
	if found == nil {
		return ""
	}
	info, err := os.Stat(found[1])
	switch {
	case err != nil || info.Mode().Type() == fs.ModeSocket:
		return ""
	case info.IsDir():
		return found[1] + " is a directory, and no socket"
	case info.Mode().IsRegular():
		return found[1] + " is a plain file, and no socket"
	}
	return found[1] + " is no socket"
}

// unreachable leaves out what gRPC says about its own workings.
func unreachable(message string) string {
	if i := strings.Index(message, "dial unix "); i >= 0 {
		return noAgent + strings.TrimSuffix(message[i:], `"`)
	}
	return message
}

// blame names the Workload API where it is that, and not the agent, which is out
// of reach.
func (a *app) blame(f failure) failure {
	path, ok := strings.CutPrefix(a.workloadAPI, "unix://")
	if !ok || !strings.Contains(f.message, "dial unix "+path+":") && !strings.HasPrefix(f.message, noAgent+path+" is ") {
		return f
	}
	f.message = strings.Replace(f.message, noAgent, "cannot reach the Workload API: ", 1)
	f.hint = hintWorkloadAPI
	return f
}

// pathFlag is the value of a flag that names a file. An empty one is a mistake,
// such as an unset variable of a script, and no other word for standard input or
// output.
type pathFlag struct{ path *string }

// String, Set and Type make pathFlag a flag.
func (p pathFlag) String() string {
	if p.path == nil {
		return ""
	}
	return *p.path
}

// Set refuses the empty path.
func (p pathFlag) Set(path string) error {
	if path == "" {
		return errors.New("the name of a file is empty; - is standard input or output")
	}
	*p.path = path
	return nil
}

// Type names the flag's values in the help.
func (p pathFlag) Type() string { return "file" }

// source names where an input came from.
func source(path string) string {
	if path == "" || path == "-" {
		return "standard input"
	}
	return path
}
