package agent

import (
	"context"
	"errors"

	"go.uber.org/zap"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// serveDoor has a door serve, in place of another of its name, which lets calls under
// way end and takes no more. It requires that the agent serves, or is about to.
func (a *Agent) serveDoor(d *door) {
	ctx, end := context.WithCancel(a.serving)
	d.end = end
	a.mu.Lock()
	before := a.doors[d.Name]
	a.doors[d.Name] = d
	if a.health != grpc_health_v1.HealthCheckResponse_UNKNOWN {
		d.tell(a.health)
	}
	a.mu.Unlock()
	serving := a.serving
	a.upper.Go(func() error {
		defer end()
		return d.run(ctx, serving)
	})
	if before != nil {
		before.end()
	}
}

// moved are the sockets that a reload opens, and the way back.
type moved struct {
	agent *Agent
	doors []*door
}

// move opens the sockets that a configuration has elsewhere. Nobody is served there yet.
func (a *Agent) move(ctx context.Context, next *Config) (*moved, error) {
	m, old := &moved{agent: a}, a.cfg
	if next.Listen.Native.Socket == old.Admin.Socket || next.Admin.Socket == old.Listen.Native.Socket {
		return nil, errors.New("a socket cannot take the place of the agent's other one at once; move that one away by a reload of its own first")
	}
	var err error
	if next.Listen.Native.Socket != old.Listen.Native.Socket {
		err = m.open(a.openNative(ctx, next))
	}
	if err == nil && next.Admin.Socket != old.Admin.Socket && next.Admin.Socket != "" {
		err = m.open(a.openAdmin(ctx, next))
	}
	if err != nil {
		return nil, errors.Join(err, m.back())
	}
	return m, nil
}

func (m *moved) open(d *door, err error) error {
	if err == nil {
		m.doors = append(m.doors, d)
	}
	return err
}

// back undoes it.
func (m *moved) back() error {
	var err error
	for _, d := range m.doors {
		err = errors.Join(err, d.discard())
	}
	return err
}

// take has the doors serve.
func (m *moved) take() {
	for _, d := range m.doors {
		m.agent.logger.Info("socket moved", zap.String("door", d.Name), zap.String("to", d.listener.Addr().String()))
		m.agent.serveDoor(d)
	}
}
