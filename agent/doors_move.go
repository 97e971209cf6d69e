package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"go.uber.org/zap"
)

// openedDoors returns the doors that serve.
func (a *Agent) openedDoors() []*door {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Values(a.doors))
}

// serveDoor has a door serve, in place of another of its name, which lets calls under
// way end and takes no more. It requires that the agent serves, or is about to.
func (a *Agent) serveDoor(d *door) {
	ctx, end := context.WithCancel(a.serving)
	d.end = end
	a.mu.Lock()
	before := a.doors[d.Name]
	a.doors[d.Name] = d
	a.mu.Unlock()
	a.upper.Go(func() error {
		defer end()
		return d.run(ctx)
	})
	if before != nil {
		before.drain = drainMoved
		before.end()
	}
}

// moved are the sockets that a reload opens, and the way back.
type moved struct {
	agent *Agent
	doors []*door
	undo  func() error // of what was changed of sockets that stay
}

// move opens the sockets that a configuration has elsewhere, and gives those that stay
// their mode and group. Nobody is served there yet.
func (a *Agent) move(ctx context.Context, next *Config) (*moved, error) {
	m := &moved{agent: a, undo: func() error { return nil }}
	old := a.cfg
	var err error
	switch {
	case next.Listen.Native.Socket != old.Listen.Native.Socket:
		err = m.open(a.openNative(ctx, next))
	case next.Listen.Native.Mode != old.Listen.Native.Mode || next.Listen.Native.gid() != old.Listen.Native.gid():
		m.undo = func() error { return setSocket(&old.Listen.Native) }
		err = setSocket(&next.Listen.Native)
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
	err := m.undo()
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

// setSocket gives a socket its mode and group. Meanwhile it is not more open than
// before, nor than it will be.
func setSocket(c *NativeConfig) error {
	info, err := os.Lstat(c.Socket)
	if err == nil {
		err = os.Chmod(c.Socket, info.Mode().Perm()&c.Mode.FileMode())
	}
	if gid := c.gid(); err == nil {
		if gid < 0 {
			gid = os.Getegid()
		}
		err = os.Lchown(c.Socket, -1, gid)
	}
	if err == nil {
		err = os.Chmod(c.Socket, c.Mode.FileMode())
	}
	if err != nil {
		return fmt.Errorf("native socket: %w", err)
	}
	return nil
}
