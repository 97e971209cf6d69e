package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/kms-agent/kms-agent/agent/serve"
	"github.com/kms-agent/kms-agent/agent/serve/admin"
	"github.com/kms-agent/kms-agent/agent/serve/native"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/identity"
)

// drainDoor is how long calls under way may take once the agent stops.
const drainDoor = 5 * time.Second

// drainMoved is how long calls under way may take at a door that a reload has moved, and
// no less than the longest deadline; streams that last are cut off then.
const drainMoved = time.Minute

// door is one open listener and the server behind it.
type door struct {
	*serve.Door
	end      context.CancelFunc // ends its run
	listener net.Listener
	server   *grpc.Server
	health   *health.Server
	moved    time.Duration // how long calls may take once it has been moved
}

// openDoors listens on every socket of the configuration, or on none.
func (a *Agent) openDoors(ctx context.Context) ([]*door, error) {
	cfg := a.configuration()
	n, err := a.openNative(ctx, cfg)
	if err != nil {
		return nil, err
	}
	doors := []*door{n}
	if cfg.Admin.Socket == "" {
		return doors, nil
	}
	m, err := a.openAdmin(ctx, cfg)
	if err != nil {
		return nil, errors.Join(err, n.discard())
	}
	return append(doors, m), nil
}

func (a *Agent) openNative(ctx context.Context, cfg *Config) (*door, error) {
	listener, err := identity.Listen(ctx, cfg.Listen.Native.Socket, cfg.Listen.Native.Mode.FileMode(), cfg.Listen.Native.gid())
	if err != nil {
		return nil, fmt.Errorf("native socket: %w", err)
	}
	d := a.newDoor("native", listener, a.creds, identity.CallerFromContext)
	native.Register(d.server, d.Door)
	return d, nil
}

// gid is the group of the socket, -1 for that of the process.
func (c *NativeConfig) gid() int {
	if c.Group == nil {
		return -1
	}
	return int(*c.Group)
}

// openAdmin opens the door of administrators, who are known by what the kernel says of
// them, not by SPIFFE: the agent can be looked at while its identities are what is
// broken.
func (a *Agent) openAdmin(ctx context.Context, cfg *Config) (*door, error) {
	creds, err := identity.NewCredentials(identity.Config{TrustDomain: cfg.TrustDomain})
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	listener, err := identity.Listen(ctx, cfg.Admin.Socket, 0o600, -1)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	d := a.newDoor("admin", listener, creds, localPeer)
	admin.Register(d.server, d.Door, a)
	return d, nil
}

// discard closes a door that never served.
func (d *door) discard() error {
	d.server.Stop() // it has workers already
	return d.listener.Close()
}

// localPeer is the identity of an administrator: the kernel's word alone.
func localPeer(ctx context.Context) (identity.Caller, error) {
	peer, ok := identity.PeerFromContext(ctx)
	if !ok {
		return identity.Caller{}, identity.ErrUnidentified
	}
	return identity.Caller{Proof: identity.ProofStaticPeer, Peer: peer}, nil
}

func (a *Agent) newDoor(name string, l net.Listener, creds *identity.Credentials, identify func(context.Context) (identity.Caller, error)) *door {
	bounds := limits(a.configuration())
	d := &door{
		Door:     serve.NewDoor(name, a.service, bounds, identify, a.logger),
		listener: serve.Bound(l, bounds.MaxConnections, bounds.MaxConnectionsPerUser, a.overConnections(name)),
		health:   health.NewServer(),
		moved:    max(drainMoved, bounds.MaxDeadline+drainDoor),
	}
	d.server = d.Server(creds, a.tracing.serverOptions()...)
	grpc_health_v1.RegisterHealthServer(d.server, d.health)
	return d
}

// overConnections tells of connections that were too many for one user.
func (a *Agent) overConnections(door string) func(uid uint32) {
	seldom := rate.Sometimes{First: 1, Interval: 10 * time.Second}
	return func(uid uint32) {
		a.metrics.RefusedConnection(door, "limit")
		seldom.Do(func() {
			a.logger.Warn("connection refused: its user has too many open", zap.String("door", door), zap.Uint32("uid", uid),
				zap.String("limit", "limits.max_connections_per_user"))
		})
	}
}

// healthEvery is how often the health service learns of the agent's state.
const healthEvery = time.Second

// tellHealth keeps the health service at what status says: an agent that is
// degraded still serves.
func (a *Agent) tellHealth(ctx context.Context) error {
	tick := time.NewTicker(healthEvery)
	defer tick.Stop()
	var last *adminv1.StatusResponse
	records := auditWatch{logger: a.logger}
	for {
		now := a.Status()
		records.look(now.GetAudit())
		a.logChange(last, now)
		last = now
		state := grpc_health_v1.HealthCheckResponse_SERVING
		if now.GetState() == stateNotServing {
			state = grpc_health_v1.HealthCheckResponse_NOT_SERVING
		}
		a.mu.Lock()
		a.health = state
		for _, d := range a.doors {
			d.tell(state)
		}
		a.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// logChange says once when the agent's state has changed, and why.
func (a *Agent) logChange(last, now *adminv1.StatusResponse) {
	switch {
	case now.GetState() == last.GetState():
	case now.GetState() != stateServing:
		a.logger.Warn("agent has problems", zap.String("state", now.GetState()), zap.Strings("problems", now.GetProblems()))
	case last != nil:
		a.logger.Info("agent serves without problems again")
	}
}

// tell sets what the health service says.
func (d *door) tell(state grpc_health_v1.HealthCheckResponse_ServingStatus) {
	d.health.SetServingStatus("", state)
	d.health.SetServingStatus(kmsagentv1.KMS_ServiceDesc.ServiceName, state)
}

// run serves until ctx ends, then lets calls under way finish: for drainDoor where the
// agent stops, which is the end of agent, and for as long as any of them may take where
// another door has taken its place.
func (d *door) run(ctx, agent context.Context) error {
	stopped := make(chan struct{})
	serving, cancel := context.WithCancel(ctx)
	go func() {
		defer close(stopped)
		<-serving.Done()
		d.health.Shutdown()
		drain := drainDoor
		if ctx.Err() != nil && agent.Err() == nil {
			drain = d.moved
		}
		force := time.AfterFunc(drain, d.server.Stop)
		defer force.Stop()
		defer context.AfterFunc(agent, func() { time.AfterFunc(drainDoor, d.server.Stop) })()
		d.server.GracefulStop()
	}()
	err := d.server.Serve(d.listener)
	cancel()
	<-stopped
	d.Wait()
	if err != nil && ctx.Err() == nil {
		d.Logger.Error("socket failed", zap.String("door", d.Name), zap.Error(err))
		return fmt.Errorf("%s socket: %w", d.Name, err)
	}
	return nil
}
