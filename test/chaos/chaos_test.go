package chaos

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/serve"
)

// short is how long a run lasts unless CHAOS_TIME says otherwise, and seeds are those
// that the short form has; another one is CHAOS_SEED.
const short = 18 * time.Second

func seeds() []uint64 { return []uint64{4351} }

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestChaos disturbs an agent in every way that its schedule knows, and checks what it
// answered meanwhile. CHAOS_CHECK is a history that is checked instead.
func TestChaos(t *testing.T) {
	if path := os.Getenv("CHAOS_CHECK"); path != "" {
		h, err := loadHistory(path)
		if err != nil {
			t.Fatal(err)
		}
		found, m := check(h)
		judge(t, h, m, found)
		return
	}
	length, chosen := short, seeds()
	if text := os.Getenv("CHAOS_TIME"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil || length < short {
			t.Fatalf("CHAOS_TIME is a duration of %s at least, such as 10m, not %q", short, text)
		}
	}
	if text := os.Getenv("CHAOS_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatalf("CHAOS_SEED: %v", err)
		}
		chosen = []uint64{seed}
	}
	for _, seed := range chosen {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { run(t, seed, length) })
	}
}

func run(t *testing.T, seed uint64, length time.Duration) {
	steps := plan(seed, length)
	t.Log(table(seed, length, steps))
	cl := newCluster(t)
	rec := newRecorder(seed, cl.setup())
	nem := newNemesis(cl, rec, steps)
	k := &kept{}
	var callers []*caller
	for _, name := range []string{"alice", "bob", "carol"} {
		callers = append(callers, cl.caller(name, rec, k))
	}
	for _, c := range callers { // so that each is connected
		(&worker{c, newRand()}).encrypt()
	}
	before := cl.rested()
	ctx, cancel := context.WithCancel(t.Context())
	defer time.AfterFunc(length, cancel).Stop()
	defer cancel()
	var samples []sample
	var beside sync.WaitGroup
	beside.Go(func() { samples = cl.watch(ctx, rec, length) })
	beside.Go(func() { nem.run(ctx) })
	beside.Go(func() { rec.watchHost(ctx, []string{"hsm", "net", "local"}) })
	work(ctx, callers, seed)
	cancel()
	beside.Wait()
	for _, problem := range nem.problems {
		t.Errorf("the nemesis failed: %s", problem)
	}
	finish(t, cl, nem, callers, k)
	h := rec.h
	found, m := check(h)
	found = append(found, cl.unrecorded(h)...)
	judge(t, h, m, found)
	growth(t, before, samples, cl.rested(), length)
	cl.leavesNothing()
	keep(t, h, steps, length)
}

// finish lets every message be opened, that was ever returned, once all is well again. What
// the agent asks to be tried again is: whether it may ask is the rule "available".
func finish(t *testing.T, cl *cluster, nem *nemesis, callers []*caller, k *kept) {
	t.Helper()
	began := nem.now()
	alice := &worker{callers[0], newRand()}
	everythingServes(t, alice)
	t.Logf("everything serves %s after the end of the load", (nem.now() - began).Round(time.Millisecond))
	deadline := time.Now().Add(2 * recovery)
	repeated, lost := 0, 0
	opens := func(operation, key string, open func(context.Context, *call)) {
		for {
			c, ctx, cancel := alice.begin(operation, key)
			open(ctx, c)
			cancel()
			switch {
			case c.Reason == "" && c.Wrong == "":
				return
			case serve.Code(kms.Reason(c.Reason)) == codes.Unavailable && time.Now().Before(deadline):
				repeated++
				time.Sleep(100 * time.Millisecond)
				continue
			}
			if lost++; lost <= 5 {
				t.Errorf("seed %d, rule durable: what was returned once does not open at the end\n  %s", nem.h.Seed, c)
			}
			return
		}
	}
	for _, m := range k.messages {
		opens("decrypt", m.key, func(ctx context.Context, c *call) { alice.decryptIn(ctx, c, m) })
	}
	for _, e := range k.keys {
		if e.wrap {
			opens("unwrap", e.key, func(ctx context.Context, c *call) { alice.unwrapIn(ctx, c, e) })
		} else {
			opens("decrypt-data-key", e.key, func(ctx context.Context, c *call) { alice.decryptKeyIn(ctx, c, e) })
		}
	}
	if lost > 5 {
		t.Errorf("... and %d others", lost-5)
	}
	t.Logf("%d messages and %d data keys open at the end, %d do not; %d calls were repeated", len(k.messages), len(k.keys), lost, repeated)
}

// everythingServes waits until every key encrypts with a confirmation from upstream.
func everythingServes(t *testing.T, w *worker) {
	t.Helper()
	for _, key := range []string{"orders", "ledger", "notes", "pair"} {
		for deadline := time.Now().Add(2 * recovery); ; time.Sleep(50 * time.Millisecond) {
			c, ctx, cancel := w.begin("encrypt", key)
			w.encryptIn(ctx, c)
			cancel()
			if c.Reason == "" && c.Uses[0].Source != grace {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("seed %d, rule recovery: %s does not serve at the end: %s\n%s", w.rec.h.Seed, key, c, table(0, 0, nil))
			}
		}
	}
}

// judge fails for violations and prints what happened.
func judge(t *testing.T, h *history, m *model, found []violation) {
	t.Helper()
	t.Log(m.summary())
	count := map[string]int{}
	for _, v := range found {
		if count[v.Rule]++; count[v.Rule] <= 3 {
			t.Error(h.report(v))
		}
	}
	for rule, n := range count {
		if n > 3 {
			t.Errorf("rule %s: %d violations", rule, n)
		}
	}
}

// keep writes the history of a run that failed, or where CHAOS_DIR says.
func keep(t *testing.T, h *history, steps []step, length time.Duration) {
	t.Helper()
	dir := os.Getenv("CHAOS_DIR")
	if dir == "" {
		if !t.Failed() {
			return
		}
		dir = os.TempDir()
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, fmt.Sprintf("chaos-%d", h.Seed))
	if err := h.save(path + ".json"); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path+".txt", []byte(table(h.Seed, length, steps)+"\n"+h.actions()), 0o600); err != nil {
		t.Error(err)
	}
	t.Logf("the history is in %s.json, what was done in %s.txt; replay with CHAOS_SEED=%d CHAOS_TIME=%s", path, path, h.Seed, length)
}

func (h *history) actions() string {
	var b strings.Builder
	for _, a := range h.Actions {
		b.WriteString(a.String() + "\n")
	}
	return b.String()
}
