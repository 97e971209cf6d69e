package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/agent"
	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/plugins/local"
)

// exitCode is what the process ends with. The numbers are part of the
// interface and never change their meaning.
type exitCode int

const (
	exitOK          exitCode = 0
	exitFailure     exitCode = 1
	exitUsage       exitCode = 2
	exitDenied      exitCode = 3
	exitUnavailable exitCode = 4
	exitInvalid     exitCode = 5
	exitIncomplete  exitCode = 6
	exitPartly      exitCode = 7
	exitInterrupted exitCode = 130
)

// exitMeaning is one row of the table of exit codes.
type exitMeaning struct {
	code    exitCode
	meaning string
}

// exitCodes is the one table: the help and docs/cli.md show it.
func exitCodes() []exitMeaning {
	return []exitMeaning{
		{exitOK, "done"},
		{exitFailure, "failed for a reason without a code of its own"},
		{exitUsage, "the command line is wrong, or has not the --confirm that is needed; nothing was done"},
		{exitDenied, "denied: policy gives this caller no such operation on such a key, the caller or the agent could not be identified, or a file or socket does not admit this user"},
		{exitUnavailable, "not available now: the agent, its backend or its audit log; the same command may succeed later"},
		{exitInvalid, "what was given is not valid or not there: message, context, configuration, audit log, key or keystore"},
		{exitIncomplete, "the output already written to a pipe is incomplete and must be thrown away"},
		{exitPartly, "of several files some failed; the others are done, and the same command tries again"},
		{exitInterrupted, "interrupted"},
	}
}

// usageError is a wrong command line.
type usageError struct{ message string }

func (e *usageError) Error() string { return e.message }

func usagef(format string, a ...any) error { return &usageError{fmt.Sprintf(format, a...)} }

// codedError gives err a code, and perhaps more words and a hint, of its own.
type codedError struct {
	code   exitCode
	prefix string
	hint   string
	err    error
}

func (e *codedError) Error() string { return e.prefix + e.err.Error() }
func (e *codedError) Unwrap() error { return e.err }

// failure is an error as the user sees it.
type failure struct {
	code            exitCode
	message, reason string
	hint            string
}

// fail prints err, if there is one, and returns the exit code.
func (a *app) fail(ctx context.Context, command *cobra.Command, err error) int {
	if err == nil {
		return int(exitOK)
	}
	f := a.blame(classify(err))
	if ctx.Err() != nil && f.code != exitIncomplete {
		f = failure{code: exitInterrupted, message: "interrupted"}
	}
	name := strings.TrimPrefix(command.CommandPath(), "kms-agent")
	prefix := "kms-agent:" + name
	if name != "" {
		prefix += ":"
	}
	message := f.message
	if f.reason != "" {
		message += " (reason " + f.reason + ")"
	}
	if strings.Contains(message, "\n") {
		_, _ = fmt.Fprintln(a.errOut, prefix+"\n"+message)
	} else {
		_, _ = fmt.Fprintln(a.errOut, prefix, message)
	}
	if f.code == exitUsage && f.hint == "" {
		f.hint = command.CommandPath() + " --help shows how it is used"
	}
	if f.hint != "" {
		_, _ = fmt.Fprintln(a.errOut, "hint:", f.hint)
	}
	return int(f.code)
}

// classify decides the code of an error, its words and its hint.
func classify(err error) failure {
	var usage *usageError
	var coded *codedError
	var faults agent.Faults
	var answer *client.Error
	switch {
	case errors.As(err, &usage):
		return failure{code: exitUsage, message: err.Error()}
	case errors.As(err, &coded):
		f := classify(coded.err)
		f.code, f.message = coded.code, coded.prefix+f.message
		if coded.hint != "" {
			f.hint = coded.hint
		}
		return f
	case errors.As(err, &answer):
		return classifyAnswer(answer)
	case errors.As(err, &faults):
		return failure{code: exitInvalid, message: err.Error(), hint: "put these right; nothing was changed"}
	}
	if f, ok := classifyStatus(err); ok {
		return f
	}
	return failure{code: localCode(err), message: err.Error(), hint: localHint(err)}
}

// localHint says what to do about some errors that did not come from an agent.
func localHint(err error) string {
	switch {
	case errors.Is(err, agent.ErrConfigFile) && errors.Is(err, fs.ErrNotExist):
		return "kms-agent config default prints one to start from"
	case errors.Is(err, local.ErrSeal) && errors.Is(err, local.ErrNotExist):
		return "a key file holds 32 random bytes: head -c 32 /dev/urandom under umask 077, or kms-agent keys local init --create-key-file"
	case errors.Is(err, local.ErrNotExist):
		return "kms-agent keys local init makes a keystore"
	case errors.Is(err, unix.ENOSPC):
		return "make room, or write to another place"
	case errors.Is(err, context.DeadlineExceeded):
		return "allow more time with --timeout"
	}
	return ""
}

// classifyAnswer reads what the agent answered a client.
func classifyAnswer(e *client.Error) failure {
	f := failure{code: codeOf(e.Code), message: e.Message, reason: string(e.Reason)}
	if e.RetryAfter > 0 {
		f.message += fmt.Sprintf("; try again in %v", e.RetryAfter.Round(time.Millisecond))
	}
	if e.RequestID != "" {
		f.message += ", request " + e.RequestID
	}
	switch {
	case e.Reason != "":
		f.hint = hintFor(kms.Reason(e.Reason))
	default:
		f = unanswered(f, e.Code, e.Message)
	}
	return f
}

// classifyStatus reads what the agent answered.
func classifyStatus(err error) (failure, bool) {
	s, ok := status.FromError(err)
	if !ok {
		return failure{}, false
	}
	f := failure{code: codeOf(s.Code()), message: s.Message()}
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			f.reason, f.hint = d.GetReason(), hintFor(kms.Reason(d.GetReason()))
		case *errdetails.RetryInfo:
			f.message += fmt.Sprintf("; try again in %v", d.GetRetryDelay().AsDuration().Round(time.Millisecond))
		}
	}
	if f.reason == "" {
		f = unanswered(f, s.Code(), f.message)
	}
	return f, true
}

// codeOf is the exit code of each gRPC code.
func codeOf(code codes.Code) exitCode {
	switch code {
	case codes.OK:
		return exitOK
	case codes.PermissionDenied, codes.Unauthenticated:
		return exitDenied
	case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Aborted:
		return exitUnavailable
	case codes.InvalidArgument, codes.NotFound, codes.OutOfRange, codes.FailedPrecondition, codes.AlreadyExists:
		return exitInvalid
	case codes.Canceled:
		return exitInterrupted
	default:
		return exitFailure
	}
}

// hintFor says what to do about each reason.
func hintFor(reason kms.Reason) string {
	switch reason {
	case kms.ReasonUnidentified:
		return "a workload needs SPIFFE_ENDPOINT_SOCKET, another process an entry in identity.static_peers of the agent's configuration"
	case kms.ReasonAccessDenied:
		return "kms-agent whoami shows who you are, kms-agent keys list what you may use; on the agent's host, kms-agent policy explain --caller ID --proof PROOF --operation OPERATION --key KEY tells of each rule why it does not let you"
	case kms.ReasonInvalidRequest:
		return "the message above says what to change"
	case kms.ReasonInvalidMessage:
		return "this was not made by kms-agent encrypt, or was changed on its way"
	case kms.ReasonDecryptFailed:
		return "it was changed, or its key or context is another; the agent's audit log says more"
	case kms.ReasonTooLarge:
		return "the limits are in the agent's configuration; encrypt and decrypt stream data of any length"
	case kms.ReasonTruncated:
		return "fetch the whole message again; what was decrypted so far is not to be used"
	case kms.ReasonKeyUnusable:
		return "its wrapping key is disabled, destroyed or expired, or has made all its wraps; once the backend's administrator has enabled or rotated it, the agent notices within seconds"
	case kms.ReasonKeySuspended:
		return "the backend refused the key and the agent is asking again; kms-agent status says more"
	case kms.ReasonBackendDown, kms.ReasonBackendBroken:
		return "kms-agent status says what is wrong with the backend"
	case kms.ReasonTooManyRequests:
		return "fewer requests at a time, or a higher limit in the agent's configuration"
	case kms.ReasonQuotaExceeded:
		return "the limits of a policy rule are used up; kms-agent policy explain, on the agent's host, shows them"
	case kms.ReasonQuotaUnavailable:
		return "the agent cannot store the count of a daily limit; see the disk of its state_dir, then kms-agent status"
	case kms.ReasonAuditUnavailable:
		return "the agent answers nothing that it cannot record; see its audit log's disk, then kms-agent status"
	case kms.ReasonDeadlineExceeded:
		return "allow more time with --timeout"
	case kms.ReasonConfigRejected:
		return "put this right; the agent goes on with the configuration it has"
	case kms.ReasonCancelled:
		return ""
	case kms.ReasonShuttingDown:
		return "the agent is being restarted; try again in a moment"
	default:
		return "the agent's log has the details"
	}
}

// localCode is the exit code of an error that did not come from an agent.
func localCode(err error) exitCode {
	for _, invalid := range []error{
		fs.ErrNotExist, fs.ErrExist, local.ErrUnknownKey, local.ErrUnknownVersion, local.ErrKeyState, local.ErrName,
		local.ErrNotExist, local.ErrExists, local.ErrForeign, local.ErrNewer, local.ErrTruncated, local.ErrDamaged,
		local.ErrWrongSeal, local.ErrConflict, local.ErrSeal, local.ErrInsecure,
	} {
		if errors.Is(err, invalid) {
			return exitInvalid
		}
	}
	switch {
	case errors.Is(err, fs.ErrPermission), errors.Is(err, local.ErrAccess):
		return exitDenied
	case errors.Is(err, local.ErrBusy), errors.Is(err, context.DeadlineExceeded):
		return exitUnavailable
	case errors.Is(err, agent.ErrConfigFile):
		return exitInvalid
	}
	return exitFailure
}
