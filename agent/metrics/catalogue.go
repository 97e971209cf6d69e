package metrics

import "github.com/prometheus/client_golang/prometheus"

// Kind is a metric's type in Prometheus' words.
type Kind string

// The kinds.
const (
	Counter   Kind = "counter"
	Gauge     Kind = "gauge"
	Histogram Kind = "histogram"
)

// Metric describes one metric. Names, labels and their meaning are a promise.
type Metric struct {
	Name   string
	Kind   Kind
	Labels []string
	Help   string
}

func (m Metric) desc() *prometheus.Desc {
	return prometheus.NewDesc(m.Name, m.Help, m.Labels, nil)
}

// Names of the metrics that events feed.
const (
	requests          = "kms_agent_requests_total"
	requestSeconds    = "kms_agent_request_duration_seconds"
	answers           = "kms_agent_key_answers_total"
	keyBytes          = "kms_agent_key_bytes_total"
	callerRequests    = "kms_agent_caller_requests_total"
	callerBytes       = "kms_agent_caller_bytes_total"
	callerUpstream    = "kms_agent_caller_upstream_calls_total"
	upstreamCalls     = "kms_agent_upstream_calls_total"
	upstreamSeconds   = "kms_agent_upstream_call_duration_seconds"
	refusedConnection = "kms_agent_refused_connections_total"
)

// Names of the metrics that are read from the agent's status at each scrape.
const (
	buildInfo        = "kms_agent_build_info"
	state            = "kms_agent_state"
	startTime        = "kms_agent_start_time_seconds"
	configGeneration = "kms_agent_config_generation"
	configLoaded     = "kms_agent_config_last_load_time_seconds"
	configRejected   = "kms_agent_config_rejected"
	identityState    = "kms_agent_identity_state"
	identityJWT      = "kms_agent_identity_jwt_bundles_state"
	identityExpiry   = "kms_agent_identity_svid_expiry_time_seconds"
	identityUpdated  = "kms_agent_identity_last_update_time_seconds"
	backendState     = "kms_agent_backend_state"
	backendRestarts  = "kms_agent_backend_restarts_total"
	backendInfo      = "kms_agent_backend_info"
	backendBreaker   = "kms_agent_backend_breaker_state"
	backendOpened    = "kms_agent_backend_breaker_opened_total"
	backendFailing   = "kms_agent_backend_failure_ratio"
	backendRefused   = "kms_agent_backend_refused_calls_total"
	backendRetries   = "kms_agent_backend_retries_total"
	keyConfirmed     = "kms_agent_key_confirmation_age_seconds"
	keyProblem       = "kms_agent_key_problem"
	keyEndurance     = "kms_agent_key_endurance_seconds"
	keyDown          = "kms_agent_key_upstream_down"
	keySpares        = "kms_agent_key_spares"
	keyHeld          = "kms_agent_key_held"
	keyHeldWanted    = "kms_agent_key_held_wanted"
	keySparesWanted  = "kms_agent_key_spares_wanted"
	cacheInGrace     = "kms_agent_cache_served_in_grace_total"
	cacheUnserved    = "kms_agent_cache_not_served_total"
	cacheEntries     = "kms_agent_cache_data_keys"
	cacheCapacity    = "kms_agent_cache_capacity_data_keys"
	cacheLocked      = "kms_agent_cache_locked_memory_bytes"
	cacheHits        = "kms_agent_cache_hits_total"
	cacheMisses      = "kms_agent_cache_misses_total"
	cacheRefreshes   = "kms_agent_cache_refreshes_total"
	cacheEvictions   = "kms_agent_cache_evictions_total"
	randomRequests   = "kms_agent_random_requests_total"
	randomBytes      = "kms_agent_random_bytes_total"
	randomPool       = "kms_agent_random_pool_bytes"
	randomFailing    = "kms_agent_random_failing"
	storeKeys        = "kms_agent_store_data_keys"
	storeSaved       = "kms_agent_store_last_save_time_seconds"
	storeSaves       = "kms_agent_store_saves_total"
	storeFailing     = "kms_agent_store_failing"
	storeRestored    = "kms_agent_store_restored_data_keys"
	storeRefused     = "kms_agent_store_refused"
	limitCallers     = "kms_agent_limit_callers"
	limitRefused     = "kms_agent_limit_refused_total"
	limitFailing     = "kms_agent_limit_failing"
	auditRecords     = "kms_agent_audit_last_sequence"
	auditRefused     = "kms_agent_audit_refused_total"
	auditFailing     = "kms_agent_audit_failing"
	auditUnrecorded  = "kms_agent_audit_unrecorded_total"
	auditCoalesced   = "kms_agent_audit_coalesced_denials_total"
	auditWritten     = "kms_agent_audit_sink_records_total"
	auditLost        = "kms_agent_audit_sink_lost_records_total"
	auditSinkFailing = "kms_agent_audit_sink_failing"
)

// Catalogue lists every metric of the agent's own, in the order of the
// documentation. docs/metrics.md is made from it.
func Catalogue() []Metric {
	return append(eventMetrics(), statusMetrics()...)
}

func eventMetrics() []Metric {
	return []Metric{
		{requests, Counter, []string{"door", "operation", "outcome", "reason"}, "Operations that ended: outcome is success, denied or error; reason is that of the error table, empty after success. A stream counts once, when it ends."},
		{requestSeconds, Histogram, []string{"door", "operation"}, "Time from the arrival of an operation to its audit record, successful ones only; streams are not in it."},
		{answers, Counter, []string{"key", "operation", "freshness"}, "Successful operations on a key by how it was known to be good: upstream, cached or grace."},
		{keyBytes, Counter, []string{"key", "direction"}, "Bytes of payload that went in and out of successful operations on a key."},
		{callerRequests, Counter, []string{"caller", "operation"}, "Operations by SPIFFE ID of the caller, successful or not. Callers after the first metrics.max_callers count as other."},
		{callerBytes, Counter, []string{"caller", "direction"}, "Bytes of payload of a caller's successful operations."},
		{callerUpstream, Counter, []string{"caller", "backend"}, "Calls to a backend that were made for a caller: what a metered key service charges for. The caller agent is the agent itself: confirmations ahead of their age."},
		{upstreamCalls, Counter, []string{"backend", "call", "class"}, "Calls to a backend with their error class; ok after success. breaker-open and throttled are calls that were not made. A call that was repeated counts once."},
		{upstreamSeconds, Histogram, []string{"backend", "call"}, "Time that calls to a backend took, with waiting for their turn and the repeat; successful ones only."},
		{refusedConnection, Counter, []string{"door", "cause"}, "Connections that were closed before a caller was known: cause is handshake, or limit where its user had too many open."},
	}
}

func statusMetrics() []Metric {
	return []Metric{
		{buildInfo, Gauge, []string{"version", "fips140"}, "1, with the version of the program and the FIPS 140-3 module in force."},
		{state, Gauge, []string{"state"}, "1 for the agent's state, 0 for the others: serving, degraded, not-serving."},
		{startTime, Gauge, nil, "When the agent started, Unix time."},
		{configGeneration, Gauge, nil, "Grows by one with each configuration that is put to use."},
		{configLoaded, Gauge, nil, "When the configuration in use was loaded, Unix time."},
		{configRejected, Gauge, nil, "1 while the newest configuration file is not in use because of its faults."},
		{identityState, Gauge, []string{"state"}, "1 for the state of the agent's own identity, 0 for the others: none, starting, ready, stale, expired, denied."},
		{identityJWT, Gauge, []string{"state"}, "1 for the state of the JWT bundles, 0 for the others: none, starting, ready, stale, expired. Some Workload APIs never have any."},
		{identityExpiry, Gauge, nil, "When the agent's own X.509-SVID expires, Unix time. Absent without one."},
		{identityUpdated, Gauge, nil, "When the Workload API was last heard, Unix time. Absent before."},
		{backendState, Gauge, []string{"backend", "state"}, "1 for the state of a backend, 0 for the others: starting, up, degraded, down."},
		{backendRestarts, Counter, []string{"backend"}, "Plugin processes that were started after the first."},
		{backendInfo, Gauge, []string{"backend", "plugin_version", "fips140"}, "1, with what the plugin's process says of itself."},
		{backendBreaker, Gauge, []string{"backend", "state"}, "1 for the state of a backend's breaker, 0 for the others: closed (calls are made), open (they fail at once), half-open (one at a time)."},
		{backendOpened, Counter, []string{"backend"}, "How often the breaker has opened."},
		{backendFailing, Gauge, []string{"backend"}, "Share of failed and slow calls in the last ten seconds, 0 to 1."},
		{backendRefused, Counter, []string{"backend"}, "Calls that were not made: the breaker was open, or the backend had asked for patience."},
		{backendRetries, Counter, []string{"backend"}, "Calls that were made a second time."},
		{keyConfirmed, Gauge, []string{"key", "direction"}, "Age of the last upstream confirmation of a key, by direction: encrypt, decrypt. Absent where there is none yet."},
		{keyEndurance, Gauge, []string{"key", "direction"}, "How long a key still serves if its backend does not answer from now on, or does not already: within max_age, and then in grace. Absent where upstream has confirmed nothing yet."},
		{keyDown, Gauge, []string{"key", "direction"}, "1 while the backend does not answer for a key."},
		{keySpares, Gauge, []string{"key"}, "Data keys that stand ready for when the present ones are used up."},
		{keySparesWanted, Gauge, []string{"key"}, "How many should."},
		{keyHeld, Gauge, []string{"key"}, "Data keys that are held ready for decryption."},
		{keyHeldWanted, Gauge, []string{"key"}, "How many prewarm names."},
		{keyProblem, Gauge, []string{"key"}, "1 while something is wrong with a key; kms-agent status says what."},
		{cacheEntries, Gauge, []string{"direction"}, "Data keys in protected memory, by direction: encrypt, decrypt."},
		{cacheCapacity, Gauge, nil, "How many data keys fit: cache.max_entries."},
		{cacheLocked, Gauge, nil, "Protected memory that is reserved."},
		{cacheHits, Counter, nil, "Data keys served without waiting for upstream."},
		{cacheMisses, Counter, nil, "Data keys that upstream had to wrap or unwrap."},
		{cacheRefreshes, Counter, nil, "Confirmations that were asked for."},
		{cacheInGrace, Counter, nil, "Requests served in an outage with data keys whose confirmation is older than max_age."},
		{cacheUnserved, Counter, nil, "Requests that an outage kept from being served."},
		{cacheEvictions, Counter, nil, "Data keys destroyed before their limits: revoked, evicted, or more than there is room for."},
		{randomRequests, Counter, []string{"use", "mixed"}, "Random that was made for a use, data-key or generate-random, by whether the backend's was mixed in: true, or false for the system's alone. Absent without random.backend, as the others of random are."},
		{randomBytes, Counter, []string{"use", "mixed"}, "Bytes of that random."},
		{randomPool, Gauge, nil, "Bytes of the backend's random at hand, each of which is used once."},
		{randomFailing, Gauge, nil, "1 while the backend gives no random, so that the system's will be used alone; kms-agent status says why."},
		{storeKeys, Gauge, nil, "Data keys in the sealed store, as it was saved last. Absent without a store, as the others of it are."},
		{storeSaved, Gauge, nil, "When the sealed store was last saved, Unix time. Absent before."},
		{storeSaves, Counter, []string{"outcome"}, "Saves of the sealed store, by outcome: success, error."},
		{storeFailing, Gauge, nil, "1 while the sealed store cannot be used or written; kms-agent status says why."},
		{storeRestored, Gauge, nil, "Data keys that the sealed store had for this agent when it started."},
		{storeRefused, Gauge, []string{"reason"}, "1 since the agent started without what was stored: foreign (as after each boot with the sealer keyring), rolled-back, damaged, truncated, newer, insecure, not-a-store, unavailable, unreadable."},
		{limitCallers, Gauge, []string{"rule"}, "Callers that are counted at present under a policy rule with limits."},
		{limitRefused, Counter, []string{"rule", "limit"}, "Requests refused by a limit of a policy rule: rate, per_day, bytes_per_day, concurrency, callers. One that several rules refuse counts for each."},
		{limitFailing, Gauge, nil, "1 while the counts of daily limits cannot be stored, so that requests that need more of one are refused."},
		{auditRecords, Gauge, nil, "Number of the last audit record in its chain."},
		{auditRefused, Counter, nil, "Operations refused because their audit record could not be written."},
		{auditFailing, Gauge, nil, "1 while audit records cannot be written, so that every operation is refused."},
		{auditUnrecorded, Counter, nil, "Operations that were answered without an audit record, which only audit.on_failure: answer allows."},
		{auditCoalesced, Counter, nil, "Denials that were counted in a summary instead of having an audit record each."},
		{auditWritten, Counter, []string{"sink"}, "Records that a further sink of the audit log has taken, or checkpoints."},
		{auditLost, Counter, []string{"sink"}, "Records that a further sink will never have; the audit log has them."},
		{auditSinkFailing, Gauge, []string{"sink"}, "1 while a further sink of the audit log takes no records."},
	}
}
