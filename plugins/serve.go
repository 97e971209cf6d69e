package plugins

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"runtime"
	"time"

	"github.com/hashicorp/go-hclog"
	plugin "github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

// PluginName is what the service is called inside go-plugin's sets.
const PluginName = "backend"

// protocolVersion is the one version of api/plugin/v1 there is.
const protocolVersion = 1

// answerMargin is what of a caller's time is kept for the answer, at most.
const answerMargin = 250 * time.Millisecond

// ErrByHand is returned by Serve when no agent started the process.
var ErrByHand = errors.New("this program is a plugin of kms-agent: the agent starts it by itself; " +
	"name it in the agent's configuration as the path of a backend instead of running it")

// Handshake is what the agent and its plugins know each other by. It guards
// against mistakes, not against attackers.
func Handshake() plugin.HandshakeConfig {
	return plugin.HandshakeConfig{
		ProtocolVersion: protocolVersion,
		MagicCookieKey:  "KMS_AGENT_PLUGIN", MagicCookieValue: "7b1dd1a5c0be4ef2a0b6cf9c2a2f3c5e",
	}
}

// Sets returns the services by protocol version, for go-plugin. b is nil in
// the agent.
func Sets(b Backend) map[int]plugin.PluginSet { return sets(b, nil) }

func sets(b Backend, each grpc.UnaryServerInterceptor) map[int]plugin.PluginSet {
	return map[int]plugin.PluginSet{protocolVersion: {PluginName: &grpcPlugin{backend: b, each: each}}}
}

type grpcPlugin struct {
	plugin.NetRPCUnsupportedPlugin

	backend Backend
	each    grpc.UnaryServerInterceptor
}

// GRPCServer registers the backend; the broker is not used.
func (p *grpcPlugin) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	pluginv1.RegisterBackendServer(s, &server{backend: p.backend, each: p.each})
	return nil
}

// GRPCClient returns a *Remote.
func (p *grpcPlugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return NewRemote(conn), nil
}

// Serve is the main function of a plugin. It hardens the process (no core
// dumps, not readable by other processes of its user, no new privileges, umask
// 077), serves b to the agent that started it and returns when the agent ends
// it. SIGINT is ignored; SIGTERM closes b and exits with status 0. Started by
// hand it returns ErrByHand at once.
//
// Nothing may be written to standard output before. Standard error is logged by
// the agent: one line is one record, JSON with @level and @message (as hclog
// and a configured zap write) keeps its level and fields.
func Serve(b Backend) error {
	h := Handshake()
	if os.Getenv(h.MagicCookieKey) != h.MagicCookieValue {
		return ErrByHand
	}
	if err := Harden(); err != nil {
		return fmt.Errorf("harden the plugin's process: %w", err)
	}
	stderr := os.Stderr // go-plugin replaces the variable
	go closeOnTerm(b, stderr)
	each := recoverPanics(stderr)
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig:  h,
		VersionedPlugins: sets(b, each),
		GRPCServer: func(o []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(o, grpc.MaxRecvMsgSize(MaxMessageSize), grpc.MaxSendMsgSize(MaxMessageSize),
				grpc.ChainUnaryInterceptor(each, answerInTime))...)
		},
		Logger: hclog.New(&hclog.LoggerOptions{Level: hclog.Warn, Output: stderr, JSONFormat: true}),
	})
	return b.Close()
}

func closeOnTerm(b Backend, stderr io.Writer) {
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	<-term
	if err := b.Close(); err != nil {
		logLine(stderr, map[string]any{"@level": "error", "@message": "close the backend", "error": err.Error()})
		os.Exit(1)
	}
	os.Exit(0)
}

// AnswerMargin returns how much earlier than its caller a backend gives up that
// has so much time: a tenth of it, 250 ms at most.
func AnswerMargin(left time.Duration) time.Duration { return min(left/10, answerMargin) }

// answerInTime gives the backend a little less time than its caller has: an
// upstream that does not answer is told as such, and not mistaken for a process
// that hangs.
func answerInTime(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if deadline, ok := ctx.Deadline(); ok {
		earlier, cancel := context.WithDeadline(ctx, deadline.Add(-AnswerMargin(time.Until(deadline))))
		defer cancel()
		ctx = earlier
	}
	return handler(ctx, req)
}

// recoverPanics turns a panic of a method into an error of class Internal.
// What is logged are places in the code: neither values nor arguments, which
// might be keys.
func recoverPanics(stderr io.Writer) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (answer any, err error) {
		defer func() {
			value := recover()
			if value == nil {
				return
			}
			method := path.Base(info.FullMethod)
			logLine(stderr, map[string]any{
				"@level": "error", "@message": "panic in the backend", "method": method,
				"type": fmt.Sprintf("%T", value), "stack": frames(),
			})
			answer, err = nil, toStatus(Errorf(Internal, "the plugin panicked in %s; its log tells where", method))
		}()
		return handler(ctx, req)
	}
}

// frames returns the functions of the panicking stack with file and line.
func frames() []string {
	const depth, skip = 32, 4 // Callers, frames, the deferred function, runtime.gopanic
	pc := make([]uintptr, depth)
	next := runtime.CallersFrames(pc[:runtime.Callers(skip, pc)])
	var out []string
	for {
		f, more := next.Next()
		out = append(out, fmt.Sprintf("%s %s:%d", f.Function, path.Base(f.File), f.Line))
		if !more {
			return out
		}
	}
}

// logLine writes one record as the agent understands it.
func logLine(w io.Writer, fields map[string]any) {
	fields["@timestamp"] = time.Now().UTC().Format(time.RFC3339Nano)
	line, err := json.Marshal(fields)
	if err != nil {
		return
	}
	// There is nobody to tell when the log cannot be written.
	_, _ = w.Write(append(line, '\n'))
}
