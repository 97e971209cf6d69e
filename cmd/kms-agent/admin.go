package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kms-agent/kms-agent/agent"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

const (
	defaultAdminSocket = "/run/kms-agent/admin.sock"
	adminTimeout       = 5 * time.Second
)

// adminFlags say how to reach the administrators' socket.
type adminFlags struct {
	socket string
	config string
}

func (a *app) adminFlags(c *cobra.Command, f *adminFlags) {
	c.Flags().StringVar(&f.socket, "admin-socket", "", "the agent's admin socket (environment KMS_AGENT_ADMIN_SOCKET, else "+defaultAdminSocket+")")
	c.Flags().StringVar(&f.config, "config", "", "take the admin socket from this configuration")
}

// address is the admin socket's path.
func (a *app) adminSocket(f *adminFlags) (string, error) {
	if f.socket != "" {
		return f.socket, nil
	}
	if f.config != "" {
		cfg, err := agent.LoadConfig(f.config)
		if err != nil {
			return "", err
		}
		return cfg.Admin.Socket, nil
	}
	if socket := a.env("KMS_AGENT_ADMIN_SOCKET"); socket != "" {
		return socket, nil
	}
	return defaultAdminSocket, nil
}

// withAdmin connects to the admin socket and lets use call it. The kernel tells
// the agent who asks; there is nothing to prove.
func withAdmin(socket string, use func(adminv1.AdminClient) error) error {
	conn, err := grpc.NewClient("unix:"+strings.TrimPrefix(socket, "unix:"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("admin socket %s: %w", socket, err)
	}
	defer func() { _ = conn.Close() }()
	return use(adminv1.NewAdminClient(conn))
}

// adminStatus asks the agent behind socket for its state.
func adminStatus(ctx context.Context, socket string) (response *adminv1.StatusResponse, err error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	err = withAdmin(socket, func(c adminv1.AdminClient) error {
		response, err = c.Status(ctx, &adminv1.StatusRequest{})
		return err
	})
	return response, err
}

func newStatus(a *app) *cobra.Command {
	f, every := adminFlags{}, time.Duration(0)
	c := &cobra.Command{
		Use: "status", Short: "Show the state of the agent and of all that it depends on",
		Long: `Asks the agent on its admin socket. It answers the users and groups that its
configuration names in admin.allow, and nobody else.

With --watch it asks again and again until it is interrupted: on a terminal the
picture is redrawn, elsewhere each is printed after the other.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			socket, err := a.adminSocket(&f)
			if err != nil {
				return err
			}
			if c.Flags().Changed("watch") {
				return a.watchStatus(c.Context(), socket, every)
			}
			response, err := adminStatus(c.Context(), socket)
			if err != nil {
				return adminHint(err, socket)
			}
			return a.print(response, func(t *table) { statusTable(t, response) })
		},
	}
	c.Flags().DurationVar(&every, "watch", 0, "ask again after this time, until interrupted")
	c.Flags().Lookup("watch").NoOptDefVal = "2s"
	a.adminFlags(c, &f)
	a.outputFlag(c)
	return c
}

// watchStatus shows the state every so often until ctx ends. An agent that does
// not answer is part of the picture on a terminal, and the end elsewhere.
func (a *app) watchStatus(ctx context.Context, socket string, every time.Duration) error {
	const shortest = 100 * time.Millisecond
	if every < shortest {
		return usagef("--watch must be %v or longer", shortest)
	}
	redraw := isTerminal(a.out) && a.format == formatTable
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		response, err := adminStatus(ctx, socket)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !redraw:
			return adminHint(err, socket)
		case redraw:
			err = a.redrawStatus(response, err, socket)
		default:
			err = a.print(response, func(t *table) { statusTable(t, response) })
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// redrawStatus paints over the picture before: what is left of older lines is
// cleared, so that nothing flickers.
func (a *app) redrawStatus(response *adminv1.StatusResponse, asked error, socket string) error {
	const home, clearLine, clearBelow = "\x1b[H", "\x1b[K", "\x1b[J"
	t := &table{}
	t.row("time", when(time.Now()))
	if asked != nil {
		t.row("agent", "no answer from "+socket+": "+classify(asked).message)
	} else {
		statusTable(t, response)
	}
	picture := strings.ReplaceAll(t.render(a.colours(a.out)), "\n", clearLine+"\n")
	_, err := io.WriteString(a.out, home+picture+clearBelow)
	return err
}

func adminHint(err error, socket string) error {
	f := classify(err)
	if f.code == exitUnavailable && f.reason == "" {
		f.hint = "is the agent running, is " + socket + " its admin socket (--admin-socket), and are you its owner or root?"
	}
	if f.code == exitDenied && f.reason == "" {
		f.hint = "the admin socket " + socket + " lets its owner and root connect, and nobody else"
	} else if f.code == exitDenied {
		f.hint = "the agent answers who is named in admin.allow of its configuration, and nobody else"
	}
	return &codedError{code: f.code, hint: f.hint, err: err}
}

func statusTable(t *table, r *adminv1.StatusResponse) {
	t.row("state", r.GetState())
	for _, problem := range r.GetProblems() {
		t.row("", problem)
	}
	t.row("version", r.GetVersion()+", FIPS 140-3 module "+r.GetFips140())
	t.row("process", fmt.Sprintf("%d since %s", r.GetPid(), when(r.GetStarted().AsTime())))
	c := r.GetConfiguration()
	t.row("configuration", fmt.Sprintf("%s, generation %d, loaded %s", c.GetFile(), c.GetGeneration(), when(c.GetLoaded().AsTime())))
	if c.GetRejected() != "" {
		for line := range strings.SplitSeq("newest file not in use: "+c.GetRejected(), "\n") {
			t.row("", line)
		}
	}
	id := r.GetIdentity()
	t.row("identity", fmt.Sprintf("%s in %s", id.GetState(), id.GetTrustDomain()))
	if id.GetSpiffeId() != "" {
		t.row("", fmt.Sprintf("%s until %s", id.GetSpiffeId(), when(id.GetExpires().AsTime())))
	}
	if id.GetLastError() != "" {
		t.row("", "last error: "+id.GetLastError())
	}
	if jwt := id.GetJwtBundles(); jwt != "" && jwt != "none" {
		t.row("", "JWT bundles "+jwt)
	}
	if id.GetJwtBundlesError() != "" {
		t.row("", "last error: "+id.GetJwtBundlesError())
	}
	for _, listener := range r.GetListeners() {
		t.row("listens", listener)
	}
	for _, b := range r.GetBackends() {
		t.row("backend "+b.GetName(), backendLine(b))
		if line := breakerLine(b); line != "" {
			t.row("", line)
		}
		if b.GetLastError() != "" {
			t.row("", lastErrorOf(b)+b.GetLastError())
		}
	}
	keysRows(t, r)
	cache := r.GetCache()
	t.row("cache", fmt.Sprintf("%d encryption and %d decryption keys of %d, %d bytes in %s",
		cache.GetEncryptionKeys(), cache.GetDecryptionKeys(), cache.GetMaxEntries(), cache.GetLockedBytes(), cache.GetMemory()))
	t.row("", fmt.Sprintf("%d hits, %d misses, %d refreshes, %d evictions",
		cache.GetHits(), cache.GetMisses(), cache.GetRefreshes(), cache.GetEvictions()))
	randomRows(t, r.GetRandom())
	storeRows(t, r.GetStore())
	limitsRows(t, r)
	auditRows(t, r.GetAudit())
}

func auditRows(t *table, log *adminv1.AuditStatus) {
	t.row("audit", fmt.Sprintf("%s, %d records, %d refused", log.GetFile(), log.GetSequence(), log.GetRefused()))
	if log.GetLastError() != "" {
		t.row("", "last error: "+log.GetLastError())
	}
	if log.GetRotationError() != "" {
		t.row("", log.GetRotationError())
	}
	if log.GetCoalesced() > 0 {
		t.row("", fmt.Sprintf("%d denials were counted in summaries", log.GetCoalesced()))
	}
	for _, s := range log.GetSinks() {
		t.row("audit sink", sinkLine(s))
	}
	if s := log.GetCheckpoints(); s != nil {
		t.row("audit checkpoints", sinkLine(s))
	}
}

func keysRows(t *table, r *adminv1.StatusResponse) {
	for _, k := range r.GetKeys() {
		t.row("key "+k.GetName(), keyLine(k))
		if line := enduranceLine(k); line != "" {
			t.row("", line)
		}
		if k.GetProblem() != "" {
			t.row("", k.GetProblem())
		}
	}
	for _, o := range r.GetOutages() {
		t.row("outage of "+o.GetBackend(), fmt.Sprintf("for %s, %d requests served in grace, %d not served",
			o.GetLasts().AsDuration().Round(time.Second), o.GetInGrace(), o.GetUnserved()))
		if o.GetLastError() != "" {
			t.row("", outageError(o, r.GetBackends()))
		}
	}
}

// outageError says why calls fail. What the backend says of itself, where it is not well,
// is newer and nearer to the cause than the last of the calls.
func outageError(o *adminv1.Outage, backends []*adminv1.BackendStatus) string {
	for _, b := range backends {
		if b.GetName() == o.GetBackend() && b.GetState() != "up" && b.GetLastError() != "" {
			return "the backend is " + b.GetState() + ": its last error, above, says why"
		}
	}
	return "last error: " + o.GetLastError()
}

func randomRows(t *table, r *adminv1.RandomStatus) {
	if r == nil {
		return
	}
	t.row("random", fmt.Sprintf("of %s mixed with the system's, %d of %d bytes at hand", r.GetBackend(), r.GetPooledBytes(), r.GetPoolSize()))
	for _, u := range r.GetUses() {
		t.row("", fmt.Sprintf("%s: %d mixed, %d of the system's alone", u.GetUse(), u.GetMixed(), u.GetUnmixed()))
	}
	if r.GetLastError() != "" {
		t.row("", "last error: "+r.GetLastError())
	}
}

func storeRows(t *table, s *adminv1.StoreStatus) {
	if s == nil {
		return
	}
	t.row("sealed store", s.GetSealer())
	if saved := s.GetSaved(); saved != nil {
		t.row("", fmt.Sprintf("%d data keys, saved %s; %d saves, %d failed", s.GetDataKeys(), when(saved.AsTime()), s.GetSaves(), s.GetFailures()))
	}
	if s.GetRestored() > 0 {
		t.row("", fmt.Sprintf("%d data keys were there when the agent started, from %s before", s.GetRestored(), s.GetAge().AsDuration().Round(time.Second)))
	}
	if s.GetClockBehind() {
		t.row("", "the time of day was before one that had been: what was stored served nobody before its backend confirmed it")
	}
	if s.GetRefused() != "" {
		t.row("", "the agent started without it: "+s.GetRefused())
	}
	if s.GetProblem() != "" {
		t.row("", s.GetProblem())
	}
}

func limitsRows(t *table, r *adminv1.StatusResponse) {
	for _, l := range r.GetLimits() {
		t.row("limits of "+l.GetRule(), fmt.Sprintf("%s; %d callers counted", l.GetLimits(), l.GetCallers()))
		for _, limit := range slices.Sorted(maps.Keys(l.GetRefused())) {
			t.row("", fmt.Sprintf("%d requests refused by %s", l.GetRefused()[limit], limit))
		}
	}
	if r.GetLimitsError() != "" {
		t.row("limits", "last error: "+r.GetLimitsError())
	}
}

// lastErrorOf says whether the error is over.
func lastErrorOf(b *adminv1.BackendStatus) string {
	if b.GetState() == "up" {
		return "last error, before it was up: "
	}
	return "last error: "
}

func sinkLine(s *adminv1.AuditSink) string {
	line := fmt.Sprintf("%s, %s, %d written, %d lost", s.GetName(), s.GetFormat(), s.GetWritten(), s.GetLost())
	if s.GetRequired() {
		line += ", required"
	}
	if s.GetLastError() != "" {
		line += ": " + s.GetLastError()
	}
	return line
}

func backendLine(b *adminv1.BackendStatus) string {
	process := "no process"
	if b.GetPid() != 0 {
		process = fmt.Sprintf("process %d", b.GetPid())
	}
	return fmt.Sprintf("%s (%s %s, %s) since %s, %d calls, %d failures, %d retries, %d restarts", b.GetState(), b.GetPlugin(),
		b.GetPluginVersion(), process, when(b.GetSince().AsTime()), b.GetCalls(), b.GetFailures(), b.GetRetries(), b.GetRestarts())
}

// breakerLine says how many calls are kept from a backend; nothing where none
// ever were.
func breakerLine(b *adminv1.BackendStatus) string {
	if b.GetRefused() == 0 && b.GetBreakerOpened() == 0 && b.GetNextTry() == nil {
		return ""
	}
	line := fmt.Sprintf("breaker %s, opened %d times, %d calls refused, %.0f%% of the last calls failed or were slow",
		b.GetBreaker(), b.GetBreakerOpened(), b.GetRefused(), 100*b.GetFailureRate())
	if b.GetNextTry() != nil {
		line += ", next try " + when(b.GetNextTry().AsTime())
	}
	return line
}

func keyLine(k *adminv1.KeyStatus) string {
	line := fmt.Sprintf("%s in %s", k.GetWrappingKey(), k.GetBackend())
	if k.GetCurrentVersion() != "" {
		line += ", version " + k.GetCurrentVersion()
	}
	if d := k.GetEncryptConfirmed(); d != nil {
		line += ", encrypt confirmed " + ago(d.AsDuration())
	}
	if d := k.GetDecryptConfirmed(); d != nil {
		line += ", decrypt confirmed " + ago(d.AsDuration())
	}
	return line
}

// enduranceLine says how long a key serves without its backend, and what stands
// ready.
func enduranceLine(k *adminv1.KeyStatus) string {
	var parts []string
	if k.GetSparesWanted() > 0 {
		parts = append(parts, fmt.Sprintf("%d of %d spares", k.GetSpares(), k.GetSparesWanted()))
	}
	if k.GetHeldWanted() > 0 {
		parts = append(parts, fmt.Sprintf("%d of %d data keys held", k.GetHeld(), k.GetHeldWanted()))
	}
	for _, direction := range []struct {
		name      string
		confirmed bool
		endures   *adminv1.Endurance
	}{{"encrypts", k.GetEncryptConfirmed() != nil, k.GetEncrypt()}, {"decrypts", k.GetDecryptConfirmed() != nil, k.GetDecrypt()}} {
		if direction.confirmed {
			parts = append(parts, direction.name+" for "+direction.endures.GetLeft().AsDuration().Round(time.Second).String())
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return "without its backend: " + strings.Join(parts, ", ")
}

func ago(d time.Duration) string {
	if d < time.Second {
		return "just now"
	}
	return d.Round(time.Second).String() + " ago"
}
