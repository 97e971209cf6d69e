package metrics

import (
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// statusCollector makes metrics of the agent's status: what kms-agent status
// shows and what Prometheus sees cannot differ.
type statusCollector struct {
	status func() *adminv1.StatusResponse
	byName map[string]described
}

type described struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

func newStatusCollector(status func() *adminv1.StatusResponse) *statusCollector {
	c := &statusCollector{status: status, byName: map[string]described{}}
	for _, m := range statusMetrics() {
		kind := prometheus.GaugeValue
		if m.Kind == Counter {
			kind = prometheus.CounterValue
		}
		c.byName[m.Name] = described{m.desc(), kind}
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *statusCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range c.byName {
		out <- d.desc
	}
}

// Collect implements prometheus.Collector.
func (c *statusCollector) Collect(out chan<- prometheus.Metric) {
	e := emitter{c, out}
	r := c.status()
	e.emit(buildInfo, 1, r.GetVersion(), r.GetFips140())
	e.oneOf(state, r.GetState(), []string{"serving", "degraded", "not-serving"})
	e.at(startTime, r.GetStarted())
	e.emit(configGeneration, float64(r.GetConfiguration().GetGeneration()))
	e.at(configLoaded, r.GetConfiguration().GetLoaded())
	e.is(configRejected, r.GetConfiguration().GetRejected() != "")
	e.oneOf(identityState, r.GetIdentity().GetState(), []string{"none", "starting", "ready", "stale", "expired", "denied"})
	e.oneOf(identityJWT, r.GetIdentity().GetJwtBundles(), []string{"none", "starting", "ready", "stale", "expired"})
	e.at(identityExpiry, r.GetIdentity().GetExpires())
	e.at(identityUpdated, r.GetIdentity().GetUpdated())
	for _, b := range r.GetBackends() {
		e.oneOf(backendState, b.GetState(), []string{"starting", "up", "degraded", "down"}, b.GetName())
		e.emit(backendRestarts, float64(b.GetRestarts()), b.GetName())
		e.oneOf(backendBreaker, b.GetBreaker(), []string{"closed", "open", "half-open"}, b.GetName())
		e.emit(backendOpened, float64(b.GetBreakerOpened()), b.GetName())
		e.emit(backendFailing, b.GetFailureRate(), b.GetName())
		e.emit(backendRefused, float64(b.GetRefused()), b.GetName())
		e.emit(backendRetries, float64(b.GetRetries()), b.GetName())
		e.emit(backendInfo, 1, b.GetName(), b.GetPluginVersion(), b.GetFips140())
	}
	for _, k := range r.GetKeys() {
		if d := k.GetEncryptConfirmed(); d != nil {
			e.emit(keyConfirmed, d.AsDuration().Seconds(), k.GetName(), "encrypt")
		}
		if d := k.GetDecryptConfirmed(); d != nil {
			e.emit(keyConfirmed, d.AsDuration().Seconds(), k.GetName(), "decrypt")
		}
		e.is(keyProblem, k.GetProblem() != "", k.GetName())
		e.endurance(k)
	}
	e.cache(r.GetCache())
	e.random(r.GetRandom())
	e.store(r.GetStore())
	e.limits(r)
	e.emit(auditRecords, float64(r.GetAudit().GetSequence()))
	e.emit(auditRefused, float64(r.GetAudit().GetRefused()))
	e.is(auditFailing, r.GetAudit().GetLastError() != "")
	e.emit(auditUnrecorded, float64(r.GetAudit().GetUnrecorded()))
	e.emit(auditCoalesced, float64(r.GetAudit().GetCoalesced()))
	e.sinks(r.GetAudit())
}

// sinks tells of each sink once: names are those of places, and a place may be
// the sink of records and of checkpoints.
func (e emitter) sinks(r *adminv1.AuditStatus) {
	type counts struct {
		written, lost uint64
		failing       bool
	}
	byName := map[string]counts{}
	for _, s := range append(slices.Clip(r.GetSinks()), r.GetCheckpoints()) {
		if s == nil {
			continue
		}
		c := byName[s.GetName()]
		byName[s.GetName()] = counts{c.written + s.GetWritten(), c.lost + s.GetLost(), c.failing || s.GetLastError() != ""}
	}
	for name, c := range byName {
		e.emit(auditWritten, float64(c.written), name)
		e.emit(auditLost, float64(c.lost), name)
		e.is(auditSinkFailing, c.failing, name)
	}
}

type emitter struct {
	*statusCollector
	out chan<- prometheus.Metric
}

func (e emitter) store(s *adminv1.StoreStatus) {
	if s == nil {
		return
	}
	e.emit(storeKeys, float64(s.GetDataKeys()))
	e.at(storeSaved, s.GetSaved())
	e.emit(storeSaves, float64(s.GetSaves()-s.GetFailures()), "success")
	e.emit(storeSaves, float64(s.GetFailures()), "error")
	e.is(storeFailing, s.GetProblem() != "")
	e.emit(storeRestored, float64(s.GetRestored()))
	if s.GetRefusedReason() != "" {
		e.emit(storeRefused, 1, s.GetRefusedReason())
	}
}

func (e emitter) cache(s *adminv1.CacheStatus) {
	e.emit(cacheEntries, float64(s.GetEncryptionKeys()), "encrypt")
	e.emit(cacheEntries, float64(s.GetDecryptionKeys()), "decrypt")
	e.emit(cacheCapacity, float64(s.GetMaxEntries()))
	e.emit(cacheLocked, float64(s.GetLockedBytes()))
	e.emit(cacheHits, float64(s.GetHits()))
	e.emit(cacheMisses, float64(s.GetMisses()))
	e.emit(cacheRefreshes, float64(s.GetRefreshes()))
	e.emit(cacheEvictions, float64(s.GetEvictions()))
	e.emit(cacheInGrace, float64(s.GetInGrace()))
	e.emit(cacheUnserved, float64(s.GetUnserved()))
}

// endurance tells how long a key serves without its backend.
func (e emitter) endurance(k *adminv1.KeyStatus) {
	for direction, of := range map[string]struct {
		confirmed *durationpb.Duration
		endures   *adminv1.Endurance
	}{"encrypt": {k.GetEncryptConfirmed(), k.GetEncrypt()}, "decrypt": {k.GetDecryptConfirmed(), k.GetDecrypt()}} {
		e.is(keyDown, of.endures.GetDown(), k.GetName(), direction)
		if of.confirmed != nil {
			e.emit(keyEndurance, of.endures.GetLeft().AsDuration().Seconds(), k.GetName(), direction)
		}
	}
	e.emit(keySpares, float64(k.GetSpares()), k.GetName())
	e.emit(keySparesWanted, float64(k.GetSparesWanted()), k.GetName())
	e.emit(keyHeld, float64(k.GetHeld()), k.GetName())
	e.emit(keyHeldWanted, float64(k.GetHeldWanted()), k.GetName())
}

// random emits nothing where no backend is configured: nobody expects any of it then.
func (e emitter) random(r *adminv1.RandomStatus) {
	if r == nil {
		return
	}
	for _, u := range r.GetUses() {
		e.emit(randomRequests, float64(u.GetMixed()), u.GetUse(), "true")
		e.emit(randomRequests, float64(u.GetUnmixed()), u.GetUse(), "false")
		e.emit(randomBytes, float64(u.GetMixedBytes()), u.GetUse(), "true")
		e.emit(randomBytes, float64(u.GetUnmixedBytes()), u.GetUse(), "false")
	}
	e.emit(randomPool, float64(r.GetPooledBytes()))
	e.is(randomFailing, r.GetLastError() != "")
}

func (e emitter) limits(r *adminv1.StatusResponse) {
	for _, l := range r.GetLimits() {
		e.emit(limitCallers, float64(l.GetCallers()), l.GetRule())
		for limit, n := range l.GetRefused() {
			e.emit(limitRefused, float64(n), l.GetRule(), limit)
		}
	}
	e.is(limitFailing, r.GetLimitsError() != "")
}

func (e emitter) emit(name string, value float64, labels ...string) {
	d := e.byName[name]
	e.out <- prometheus.MustNewConstMetric(d.desc, d.kind, value, labels...)
}

func (e emitter) is(name string, yes bool, labels ...string) {
	value := 0.0
	if yes {
		value = 1
	}
	e.emit(name, value, labels...)
}

// at emits a time where there is one.
func (e emitter) at(name string, t *timestamppb.Timestamp) {
	if t != nil {
		e.emit(name, float64(t.AsTime().UnixNano())/float64(time.Second))
	}
}

// oneOf emits a series for each value that there can be, so that alerts can
// name any of them.
func (e emitter) oneOf(name, value string, values []string, labels ...string) {
	for _, v := range values {
		e.is(name, v == value, append(labels[:len(labels):len(labels)], v)...)
	}
}
