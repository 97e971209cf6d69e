package agent

import (
	"maps"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kms-agent/kms-agent/agent/kms"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	"github.com/kms-agent/kms-agent/plugins"
)

// The states of the agent as a whole.
const (
	stateServing    = "serving"
	stateDegraded   = "degraded"
	stateNotServing = "not-serving"
)

// Version is the version of the program, from its build information.
func Version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// Status tells the state of the agent and of all that it depends on.
func (a *Agent) Status() *adminv1.StatusResponse {
	a.mu.Lock()
	cfg, backends := a.cfg, maps.Clone(a.backends)
	configuration := &adminv1.Configuration{
		File: a.path, Loaded: timestamppb.New(a.loaded), Generation: a.generation, Rejected: a.rejected,
	}
	a.mu.Unlock()
	r := &adminv1.StatusResponse{
		Version: Version(), Fips140: plugins.FIPS140Module(), Pid: int32(os.Getpid()), Started: timestamppb.New(a.started),
		Configuration: configuration, Identity: a.identityStatus(cfg), Cache: a.cacheStatus(), Audit: a.auditStatus(cfg),
		Listeners: []string{"native unix:" + cfg.Listen.Native.Socket},
	}
	if cfg.Admin.Socket != "" {
		r.Listeners = append(r.Listeners, "admin unix:"+cfg.Admin.Socket)
	}
	if address := a.metricsAddress.Load(); address != nil {
		r.Listeners = append(r.Listeners, "metrics http://"+*address+"/metrics")
	}
	for _, name := range slices.Sorted(maps.Keys(backends)) {
		r.Backends = append(r.Backends, backends[name].status())
	}
	for _, h := range a.service.Health() {
		k := keyStatus(h)
		ready, wanted := a.prewarmed.of(h.Name)
		k.Held, k.HeldWanted = uint32(ready), uint32(wanted)
		r.Keys = append(r.Keys, k)
	}
	r.Outages = a.outageStatus()
	r.Store = a.storeStatus()
	a.limitsStatus(cfg, r)
	r.Random = a.randomStatus()
	judge(r)
	return r
}

// judge says what the parts mean for the whole.
func judge(r *adminv1.StatusResponse) {
	down := 0
	for _, b := range r.Backends {
		if b.State != "up" {
			problem := "backend " + b.Name + " is " + b.State
			if b.LastError != "" {
				problem += ": " + b.LastError
			}
			r.Problems = append(r.Problems, problem)
		}
		if b.State == "down" {
			down++
		}
	}
	for _, k := range r.Keys {
		if k.Problem != "" {
			r.Problems = append(r.Problems, "key "+k.Name+": "+k.Problem)
		}
	}
	if r.Configuration.Rejected != "" {
		r.Problems = append(r.Problems, "the newest configuration is not in use: "+r.Configuration.Rejected)
	}
	switch r.Identity.State {
	case "starting", "stale", "expired", "denied":
		r.Problems = append(r.Problems, "identity is "+r.Identity.State+": "+r.Identity.LastError)
	}
	switch r.Identity.JwtBundles {
	case "stale", "expired": // never heard is no problem: not every Workload API has them
		r.Problems = append(r.Problems, "JWT bundles are "+r.Identity.JwtBundles+": "+r.Identity.JwtBundlesError)
	}
	if e := r.GetRandom().GetLastError(); e != "" {
		r.Problems = append(r.Problems, "random is the system's alone: "+e)
	}
	r.Problems = append(r.Problems, auditProblems(r.Audit)...)
	if p := r.Store.GetProblem(); p != "" {
		r.Problems = append(r.Problems, "sealed store: "+p)
	}
	if r.Store.GetDevelopment() {
		r.Problems = append(r.Problems, "sealed store: the sealer file "+developmentWarning)
	}
	if r.LimitsError != "" {
		r.Problems = append(r.Problems, "limits: "+r.LimitsError)
	}
	// Without any backend the data keys in the cache are still good for a while;
	// without those, or without a record, there is no answer for anybody.
	empty := r.Cache.EncryptionKeys+r.Cache.DecryptionKeys == 0
	switch {
	case silent(r.Audit), len(r.Backends) > 0 && down == len(r.Backends) && empty:
		r.State = stateNotServing
	case len(r.Problems) > 0:
		r.State = stateDegraded
	default:
		r.State = stateServing
	}
}

func (b *backend) status() *adminv1.BackendStatus {
	s := b.supervisor.Status()
	plugin := b.cfg.Plugin
	if plugin == "" {
		plugin = b.cfg.Path
	}
	return &adminv1.BackendStatus{
		Name: b.cfg.Name, Plugin: plugin, State: string(s.State), Pid: int32(s.PID), Since: timestamppb.New(s.Since),
		Restarts: s.Restarts, Calls: s.Calls, Failures: s.Failures, LastError: s.LastError,
		Breaker: string(s.Breaker.Circuit), BreakerOpened: s.Breaker.Opened, FailureRate: s.Breaker.FailureRate,
		Refused: s.Breaker.Refused, Retries: s.Retries, NextTry: timestamp(s.Breaker.Next),
		PluginVersion: s.Plugin.Version, Fips140: s.Plugin.FIPS140, Sha256: s.SHA256, Confined: s.Confined,
	}
}

func keyStatus(h kms.KeyHealth) *adminv1.KeyStatus {
	k := &adminv1.KeyStatus{
		Name: h.Name, Backend: h.Backend, WrappingKey: h.WrappingKey, CurrentVersion: h.CurrentVersion, Problem: h.Problem,
	}
	if h.EncryptConfirmed >= 0 {
		k.EncryptConfirmed = durationpb.New(h.EncryptConfirmed)
	}
	if h.DecryptConfirmed >= 0 {
		k.DecryptConfirmed = durationpb.New(h.DecryptConfirmed)
	}
	k.Encrypt, k.Decrypt = endurance(h.Encrypt), endurance(h.Decrypt)
	k.Spares, k.SparesWanted = uint32(h.Spares), uint32(h.SparesWanted)
	return k
}

func endurance(e kms.Endurance) *adminv1.Endurance {
	out := &adminv1.Endurance{Down: e.Down, Left: durationpb.New(e.Left)}
	if e.Down {
		out.Since = durationpb.New(e.Since)
	}
	return out
}

func (a *Agent) identityStatus(cfg *Config) *adminv1.Identity {
	id := &adminv1.Identity{TrustDomain: cfg.TrustDomain.Name(), State: "none", JwtBundles: "none"}
	if a.source == nil {
		return id
	}
	s := a.source.State()
	id.State = string(s.Status)
	if s.LastError != nil {
		id.LastError = s.LastError.Error()
	}
	if !s.ID.IsZero() {
		id.SpiffeId = s.ID.String()
	}
	if s.JWT != nil {
		id.JwtBundles = string(s.JWT.Status)
		if s.JWT.LastError != nil {
			id.JwtBundlesError = s.JWT.LastError.Error()
		}
	}
	id.Expires, id.Updated = timestamp(s.Expires), timestamp(s.Updated)
	return id
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func (a *Agent) cacheStatus() *adminv1.CacheStatus {
	s := a.service.Stats()
	return &adminv1.CacheStatus{
		EncryptionKeys: s.EncryptionKeys, DecryptionKeys: s.DecryptionKeys, MaxEntries: s.MaxEntries,
		LockedBytes: s.LockedBytes, Hits: s.Hits, Misses: s.Misses, Refreshes: s.Refreshes, Evictions: s.Evictions,
		Memory: s.Memory, Spares: s.Spares, InGrace: s.InGrace, Unserved: s.Unserved,
	}
}

// outageStatus tells of the backends that do not answer.
func (a *Agent) outageStatus() []*adminv1.Outage {
	var out []*adminv1.Outage
	for _, o := range a.service.Outages() {
		s := &adminv1.Outage{Backend: o.Backend, Lasts: durationpb.New(o.Lasts), InGrace: o.Grace, Unserved: o.Refused}
		if o.Err != nil {
			s.LastError = o.Err.Error()
		}
		out = append(out, s)
	}
	return out
}

// limitsStatus adds what is known of the rules with limits.
func (a *Agent) limitsStatus(cfg *Config, r *adminv1.StatusResponse) {
	counted, err := a.quota.Status()
	if err != nil {
		r.LimitsError = err.Error()
	}
	limits := cfg.compiled.Limits()
	for _, c := range counted {
		s := &adminv1.LimitsStatus{Rule: c.Rule, Limits: limits[c.Rule].String(), Callers: uint64(c.Callers), Refused: map[string]uint64{}}
		for limit, n := range c.Refused {
			if n > 0 {
				s.Refused[string(limit)] = n
			}
		}
		r.Limits = append(r.Limits, s)
	}
}
