package agent_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kms-agent/kms-agent/agent"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/envelope"
)

// agentVariable makes the test binary an agent with the configuration that it names.
const agentVariable = "KMS_AGENT_TEST_AGENT"

func runAgent(path string) {
	cfg, err := agent.LoadConfig(path)
	if err == nil {
		var a *agent.Agent
		if a, err = agent.New(cfg, path, zap.NewNop()); err == nil {
			err = a.Run(context.Background())
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// process starts an agent in a process of its own, and waits until it serves.
func (r *rig) process() *exec.Cmd {
	r.t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{agentVariable + "=" + r.config, "GORACE=atexit_sleep_ms=0"}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { kill(cmd) })
	r.await("the agent serves", func(s *adminv1.StatusResponse) bool {
		return int(s.GetPid()) == cmd.Process.Pid && s.GetState() == "serving"
	})
	return cmd
}

func kill(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait()
	}
}

// tally counts the messages that agents gave out, by encrypted data key.
type tally struct {
	mu       sync.Mutex // guards what follows
	life     int
	messages map[string]int
	lives    map[string]map[int]bool
}

func (c *tally) add(t *testing.T, message []byte) {
	m, err := envelope.Parse(message)
	if err != nil {
		t.Errorf("what was returned is no message: %v", err)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	edk := string(m.EDKs[0].Ciphertext)
	c.messages[edk]++
	if c.lives[edk] == nil {
		c.lives[edk] = map[int]bool{}
	}
	c.lives[edk][c.life] = true
}

// lived counts the data keys that were used in several lives. Nobody adds meanwhile.
func (c *tally) lived() int {
	n := 0
	for _, lives := range c.lives {
		if len(lives) > 1 {
			n++
		}
	}
	return n
}

// TestKilledAtAnyMoment: an agent that is killed again and again under load never gives
// out more messages under a data key than its limit, and the next one always finds the
// store as it should be.
func TestKilledAtAnyMoment(t *testing.T) {
	const limit, enough = 1000, 4
	r := newRig(t, "")
	config := storing(sealers(t)["keyring"](r))
	r.write(replaced(config, "max_age: 1s, spares: 1 }", fmt.Sprintf("max_messages: %d, spares: 1 }", limit)))
	counts := &tally{messages: map[string]int{}, lives: map[string]map[int]bool{}}
	for ; counts.life < 10 || counts.lived() < enough && counts.life < 50; counts.life++ {
		cmd := r.process()
		s, err := r.status()
		if err != nil || s.GetStore().GetRefused() != "" || s.GetStore().GetProblem() != "" {
			t.Fatalf("life %d: store = %v, %v", counts.life, s.GetStore(), err)
		}
		r.load(t, cmd, counts)
	}
	lived, most := counts.lived(), 0
	for edk, n := range counts.messages {
		if n > limit {
			t.Errorf("%d messages under one data key, its limit is %d (lives %v)", n, limit, counts.lives[edk])
		}
		most = max(most, n)
	}
	t.Logf("%d data keys, %d messages at most under one, %d data keys used in several of %d lives", len(counts.messages), most, lived, counts.life)
	if lived < enough || most < limit/2 {
		t.Errorf("%d data keys were used in several lives, %d messages at most under one: the test shows nothing", lived, most)
	}
}

// load has some callers encrypt as fast as they can until the agent is killed.
func (r *rig) load(t *testing.T, cmd *exec.Cmd, counts *tally) {
	t.Helper()
	c, err := client.Dial(t.Context(), client.Options{Socket: r.path("kms.sock"), Retry: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for {
				answer, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
				if err != nil {
					return // it is dead
				}
				counts.add(t, answer.GetMessage())
			}
		})
	}
	<-time.After(time.Duration(rand.Int64N(int64(2 * time.Second)))) // any moment
	kill(cmd)
	callers.Wait()
}
