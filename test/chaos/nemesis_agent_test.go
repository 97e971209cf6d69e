package chaos

import (
	"context"
	"fmt"
	"strings"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// onKeys rotates and revokes, on the token itself.
func (n *nemesis) onKeys(ctx context.Context, s step) error {
	verb, object, _ := strings.Cut(s.Fault, " ")
	backend := "hsm"
	if object == "ledger" || object == "pair-b" {
		backend = "net"
	}
	if verb == "rotate" {
		return n.rotate(s, backend, object)
	}
	n.mu.Lock()
	current := n.versions[object]
	n.mu.Unlock()
	version := current
	if s.Roll%2 == 0 {
		version = 1 + int(s.Roll/2%uint64(current))
	}
	args := []string{object, fmt.Sprint(version)}
	disable := args
	if version == current {
		disable = append(disable, "--confirm", fmt.Sprintf("%s@%d", object, version))
	}
	return n.during(ctx, s, action{Target: fmt.Sprintf("%s@%d", object, version), Effect: disabled, Current: version == current},
		func() error {
			if err := n.onToken(backend, "disable", disable...); err != nil || s.Roll%3 > 0 {
				return err
			}
			_ = n.evict(s, "") // so that what is old must be opened anew, while it may not; an agent that is away has nothing
			return nil
		},
		func() error { return n.onToken(backend, "enable", args...) })
}

// onToken administers a token whose directory is there.
func (n *nemesis) onToken(backend, command string, args ...string) (err error) {
	n.tokens[backend].Lock()
	defer n.tokens[backend].Unlock()
	for range 3 { // a command may meet another process of the token
		if err = n.hsm(backend, command, args...); err == nil {
			return nil
		}
	}
	return err
}

func (n *nemesis) rotate(s step, backend, object string) error {
	was := n.action(action{Lane: s.Lane, Fault: s.Fault, Target: object, Effect: rotated})
	n.mu.Lock()
	n.versions[object]++
	n.mu.Unlock()
	err := n.onToken(backend, "rotate", object)
	n.atOnce(was)
	return err
}

func (n *nemesis) onAgent(ctx context.Context, s step) error {
	switch s.Fault {
	case "evict", "evict all":
		if s.Fault == "evict all" {
			return n.evict(s, "")
		}
		return n.evict(s, []string{"orders", "ledger", "notes", "pair"}[s.Roll%4])
	case "replace hsm", "replace net":
		return n.replace(s)
	case "kill agent", "restart agent":
		return n.restart(s)
	case "bad configuration", "same configuration":
		return n.reloaded(s)
	}
	set := func(change func(*settings)) func() error {
		return func() error {
			n.mu.Lock()
			change(&n.settings)
			text := n.text(n.settings)
			n.mu.Unlock()
			refused, err := n.reload(text)
			if refused {
				return fmt.Errorf("the agent refuses a good configuration")
			}
			return err
		}
	}
	switch s.Fault {
	case "forbid carol":
		return n.during(ctx, s, action{Target: "carol", Effect: forbidden}, set(func(s *settings) { s.Without = "carol" }), set(func(s *settings) { s.Without = "" }))
	case "limit carol":
		return n.during(ctx, s, action{Target: "carol", Effect: limited}, set(func(s *settings) { s.Limited = "carol" }), set(func(s *settings) { s.Limited = "" }))
	case "no grace":
		key := []string{"orders", "ledger", "notes"}[s.Roll%3]
		return n.during(ctx, s, action{Target: key, Effect: graceless}, set(func(s *settings) { s.Graceless = key }), set(func(s *settings) { s.Graceless = "" }))
	}
	return fmt.Errorf("the nemesis does not know how")
}

// evict destroys the data keys of a key, or all.
func (n *nemesis) evict(s step, key string) error {
	request := &adminv1.EvictRequest{Key: key, All: key == ""}
	was := n.action(action{Lane: s.Lane, Fault: "evict", Target: key, Effect: evicted})
	err := n.administer(func(ctx context.Context, c adminv1.AdminClient) error {
		_, err := c.Evict(ctx, request)
		return err
	})
	n.atOnce(was)
	return err
}

// replace has a plugin replaced while it works, which nobody may notice. Where its
// backend is out of order the agent keeps the one that it has.
func (n *nemesis) replace(s step) error {
	backend := strings.TrimPrefix(s.Fault, "replace ")
	was := n.action(action{Lane: s.Lane, Fault: s.Fault, Target: backend, Effect: harmless})
	err := n.administer(func(ctx context.Context, c adminv1.AdminClient) error {
		_, err := c.RestartPlugin(ctx, &adminv1.RestartPluginRequest{Backend: backend})
		return err
	})
	n.atOnce(was)
	if err != nil {
		was.Failed = err.Error()
	}
	return nil
}

// reloaded swaps the configuration for one that changes nothing, or cannot be read.
func (n *nemesis) reloaded(s step) error {
	was := n.action(action{Lane: s.Lane, Fault: s.Fault, Effect: harmless})
	defer n.atOnce(was)
	n.mu.Lock()
	good := n.text(n.settings)
	n.mu.Unlock()
	if s.Fault == "bad configuration" {
		if refused, err := n.reload(good + fmt.Sprintf("rubbish%d: [\n", s.Roll)); err != nil || !refused {
			return fmt.Errorf("the agent takes rubbish for a configuration, %w", err)
		}
	}
	refused, err := n.reload(good + fmt.Sprintf("# %d\n", s.Roll))
	if refused {
		return fmt.Errorf("the agent refuses a good configuration")
	}
	return err
}

func (n *nemesis) restart(s step) error {
	was := n.action(action{Lane: s.Lane, Fault: s.Fault, Effect: agentDown})
	end := n.stop
	if s.Fault == "kill agent" {
		end = n.kill
	}
	if err := end(); err != nil {
		return err
	}
	n.mark(&was.Begun)
	err := n.start()
	n.mark(&was.Ending)
	n.mark(&was.Ended)
	return err
}
