package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// nemesis does what the schedule says, and writes down when.
type nemesis struct {
	*cluster
	*recorder

	steps []step
	// tokens keeps what administers a token from one whose directory is away.
	tokens map[string]*sync.Mutex

	mu       sync.Mutex      // guards what follows
	settings settings        // in use
	versions map[string]int  // the current ones of objects
	off      map[string]bool // objects of which a version is disabled
	problems []string
}

func newNemesis(c *cluster, r *recorder, steps []step) *nemesis {
	return &nemesis{
		cluster: c, recorder: r, steps: steps, tokens: map[string]*sync.Mutex{"hsm": {}, "net": {}},
		versions: map[string]int{"orders": 1, "ledger": 1, "pair-a": 1, "pair-b": 1}, off: map[string]bool{},
	}
}

// run does all steps, each lane for itself. What is begun is ended, also where ctx ends.
func (n *nemesis) run(ctx context.Context) {
	var all sync.WaitGroup
	for _, l := range lanes() {
		all.Go(func() {
			for _, s := range n.steps {
				if s.Lane == l.name && n.sleep(ctx, s.At-n.now()) {
					n.do(ctx, s)
				}
			}
		})
	}
	all.Wait()
}

// sleep returns false where ctx ends first.
func (n *nemesis) sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(max(0, d))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

func (n *nemesis) do(ctx context.Context, s step) {
	var err error
	switch s.Lane {
	case "hsm":
		err = n.onHSM(ctx, s)
	case "net":
		err = n.onNet(ctx, s)
	case "local":
		err = n.onLocal(ctx, s)
	case "keys":
		err = n.onKeys(ctx, s)
	case "agent":
		err = n.onAgent(ctx, s)
	}
	if err != nil {
		n.problem(s, err)
	}
}

// problem is what the nemesis itself could not do: the run proves nothing then.
func (n *nemesis) problem(s step, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.problems = append(n.problems, fmt.Sprintf("%s %s at %s: %v", s.Lane, s.Fault, s.At, err))
}

// during has an effect for the time of a step: begin and end bring it about.
func (n *nemesis) during(ctx context.Context, s step, a action, begin, end func() error) error {
	a.Lane, a.Fault = s.Lane, s.Fault
	was := n.action(a)
	if err := begin(); err != nil {
		_ = end() // as far as it goes
		n.atOnce(was)
		was.Failed = err.Error()
		return err
	}
	n.mark(&was.Begun)
	n.sleep(ctx, s.For)
	n.mark(&was.Ending)
	err := end()
	n.mark(&was.Ended)
	return err
}

// atOnce ends an action that has no length.
func (n *nemesis) atOnce(was *action) {
	n.mark(&was.Ended)
	was.Begun, was.Ending = was.Ended, was.Ended
}

func nothing() error { return nil }

func (n *nemesis) killed(backend string) error {
	if pid := n.pid(backend); pid > 0 {
		_ = unix.Kill(pid, unix.SIGKILL) // it may have ended by itself
	}
	return nil
}

// stopped stops the process of a backend, which may be replaced before it goes on.
func (n *nemesis) stopped(ctx context.Context, s step) error {
	pid := 0
	return n.during(ctx, s, action{Target: s.Lane, Effect: down},
		func() error {
			if pid = n.pid(s.Lane); pid > 0 {
				_ = unix.Kill(pid, unix.SIGSTOP)
			}
			return nil
		},
		func() error {
			if pid > 0 {
				_ = unix.Kill(pid, unix.SIGCONT)
			}
			return nil
		})
}

func (n *nemesis) onHSM(ctx context.Context, s step) error {
	rules := func(sure bool, rules ...string) error {
		return n.during(ctx, s, action{Target: "hsm", Effect: down, Sure: sure},
			func() error { n.fault.Set(rules...); return nil }, func() error { n.fault.Set(); return nil })
	}
	switch s.Fault {
	case "kill":
		return n.during(ctx, s, action{Target: "hsm", Effect: down}, func() error { return n.killed("hsm") }, nothing)
	case "stop":
		return n.stopped(ctx, s)
	case "general error":
		return rules(true, "* rv=0x5")
	case "dead":
		return rules(true, "dead")
	case "slow":
		return rules(false, "C_Encrypt sleep_ms=5000", "C_Decrypt sleep_ms=5000")
	case "hang":
		return rules(false, "C_Decrypt skip=1 hang")
	case "loss":
		return rules(false, loss(s.Roll)...)
	case lies:
		return rules(false, "lossy")
	case "token away":
		return n.away(ctx, s, n.cluster.tokens["hsm"].Tokens(), n.tokens["hsm"])
	case "wrong PIN":
		return n.wrongPIN(ctx, s)
	}
	return fmt.Errorf("the nemesis does not know how")
}

// loss has about three of ten calls fail.
func loss(roll uint64) []string {
	r := rand.New(rand.NewPCG(roll, 0))
	var rules []string
	for range 14 {
		for _, f := range []string{"C_Encrypt", "C_Decrypt"} {
			code := []string{"0x5", "0x30", "0xb3"}[r.IntN(3)] // general, device, session
			rules = append(rules, fmt.Sprintf("%s skip=%d count=1 rv=%s", f, 1+r.IntN(4), code))
		}
	}
	return rules
}

// away moves a directory away and back.
func (n *nemesis) away(ctx context.Context, s step, path string, lock *sync.Mutex) error {
	if lock != nil {
		lock.Lock()
		defer lock.Unlock()
	}
	return n.during(ctx, s, action{Target: s.Lane, Effect: down, Sure: s.Lane == "local"}, // a token may still be open
		func() error { return os.Rename(path, path+".away") }, func() error { return os.Rename(path+".away", path) })
}

// wrongPIN has a plugin start with another PIN than the token's.
func (n *nemesis) wrongPIN(ctx context.Context, s step) error {
	path := n.cluster.tokens["hsm"].PINFile()
	return n.during(ctx, s, action{Target: "hsm", Effect: down},
		func() error {
			if err := os.WriteFile(path, fmt.Appendf(nil, "wrong-%d\n", s.Roll%1e6), 0o600); err != nil {
				return err
			}
			return n.killed("hsm")
		},
		func() error { return os.WriteFile(path, []byte(hsmtest.PIN+"\n"), 0o600) })
}

func (n *nemesis) onNet(ctx context.Context, s step) error {
	r := n.remote
	line := func(sure bool, begin, end func()) error {
		return n.during(ctx, s, action{Target: "net", Effect: down, Sure: sure},
			func() error { begin(); return nil }, func() error { end(); return nil })
	}
	switch s.Fault {
	case "cut":
		return line(false, r.Cut, func() {})
	case "refuse":
		return line(true, func() { r.Refuse(true); r.Cut() }, func() { r.Refuse(false) })
	case "gone":
		return line(true, r.Stop, r.Start)
	case "silence":
		return line(true, func() { r.Silence(true) }, func() { r.Silence(false) })
	case "halves":
		return line(false, func() { r.CutAnswers(int(s.Roll%7), 1+int(s.Roll/7%5)) }, func() { r.CutAnswers(0, 0) })
	case "delay":
		return line(false, func() { r.Delay(time.Duration(20+s.Roll%400) * time.Millisecond) }, func() { r.Delay(0) })
	case "throttle":
		return line(false, func() { r.Throttle(200 + int(s.Roll%4000)) }, func() { r.Throttle(0) })
	case "corrupt":
		return line(false, func() { r.Corrupt(int(s.Roll%7), 1+int(s.Roll/7%3)) }, func() { r.Corrupt(0, 0) })
	case "kill":
		return n.during(ctx, s, action{Target: "net", Effect: down}, func() error { return n.killed("net") }, nothing)
	case "stop":
		return n.stopped(ctx, s)
	}
	return fmt.Errorf("the nemesis does not know how")
}

func (n *nemesis) onLocal(ctx context.Context, s step) error {
	switch s.Fault {
	case "kill":
		return n.during(ctx, s, action{Target: "local", Effect: down}, func() error { return n.killed("local") }, nothing)
	case "stop":
		return n.stopped(ctx, s)
	case "keystore away":
		return n.away(ctx, s, n.path("ks"), nil)
	}
	return fmt.Errorf("the nemesis does not know how")
}
