package kms

import (
	"context"
	"encoding/hex"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/agent/quota"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
)

// maxKeyName bounds what of a caller's key name reaches policy and audit.
const maxKeyName = 128

// transaction is one operation on its way through the one door: authorise,
// act, audit.
type transaction struct {
	service *Service
	state   *state
	call    Call
	// arrived is when the request came, for max_stale of zero.
	arrived  time.Duration
	began    time.Time
	maxStale *time.Duration
	// policyStale is the part of maxStale that policy demands; nil: none.
	policyStale *time.Duration
	record      audit.Record
	// holds: data keys are taken for the agent itself, to have them ready.
	holds bool
	// again counts the beginnings after the first.
	again int
	// held is what the limits of rules have admitted.
	held quota.Held
	// note is what the record says beyond what the caller is told, unless an
	// error that is no denial needs the place.
	note string
}

// wiper is an answer that holds plaintext; it is wiped when the answer must
// not go out.
type wiper interface{ wipe() }

// perform is the one door. It runs act and writes the audit record; only then
// is there an answer.
func perform[R any](ctx context.Context, s *Service, call Call, op policy.Operation, act func(context.Context, *transaction) (R, error)) (R, error) {
	t := s.begin(call, op)
	defer t.held.Release() // after a panic too
	answer, err := act(ctx, t)
	for t.anew(ctx, err) {
		answer, err = act(ctx, t)
	}
	if auditErr := t.finish(ctx, err); auditErr != nil {
		err = auditErr
	}
	if err == nil {
		return answer, nil
	}
	if w, ok := any(&answer).(wiper); ok {
		w.wipe()
	}
	var none R
	return none, err
}

// maxAnew is how often an operation begins again because its configuration was
// replaced meanwhile.
const maxAnew = 3

// anew begins an operation again, with the configuration in use, where it failed
// because that has taken the place of its own, whose backends are gone. Rules that have
// counted it do not count it again.
func (t *transaction) anew(ctx context.Context, err error) bool {
	if !t.overtaken(err) || ctx.Err() != nil || t.again >= maxAnew {
		return false
	}
	fresh := t.service.begin(t.call, policy.Operation(t.record.Operation))
	fresh.record.BytesIn, fresh.record.UpstreamMicros = t.record.BytesIn, t.record.UpstreamMicros // BytesIn is a stream's
	t.state, t.record, t.maxStale, t.policyStale, t.note = fresh.state, fresh.record, fresh.maxStale, nil, ""
	t.again++
	return true
}

// overtaken reports whether err says no more than that the configuration was replaced.
func (t *transaction) overtaken(err error) bool {
	if errors.Is(err, errReconfigured) {
		return true
	}
	e, ok := errors.AsType[*Error](err)
	return ok && e.Reason == ReasonBackendDown && t.state != t.service.state.Load()
}

func (s *Service) begin(call Call, op policy.Operation) *transaction {
	return &transaction{
		service: s, state: s.state.Load(), call: call,
		arrived: s.now(), began: time.Now(), maxStale: call.MaxStale,
		record: audit.Record{
			Kind: audit.KindOperation, RequestID: call.RequestID, Door: call.Door, Operation: string(op),
			Caller: callerRecord(call),
		},
	}
}

func callerRecord(call Call) audit.Caller {
	return audit.Caller{
		SPIFFEID: call.Caller.ID.String(), Proof: string(call.Caller.Proof),
		UID: call.Caller.Peer.UID, GID: call.Caller.Peer.GID, PID: call.Caller.Peer.PID,
	}
}

// authoriseWith is authorise for a context that the caller made: what could not
// be in a message, such as one without bounds, does not get into the record.
func (t *transaction) authoriseWith(ctx context.Context, name string, op policy.Operation, encryptionContext map[string]string, payload uint64) (*key, error) {
	err := envelope.CheckContext(encryptionContext)
	if err == nil {
		return t.authorise(ctx, name, op, encryptionContext, payload)
	}
	if _, denial := t.authorise(ctx, name, op, nil, 0); denial != nil {
		return nil, denial
	}
	return nil, invalid(t.record.Key, "encryption context: %v", err)
}

// authorise decides whether the caller may perform op on the key of that name,
// and counts it with so many bytes of payload against the limits of the rules
// that allow it. The answers for an unknown key and for a forbidden one are the
// same.
func (t *transaction) authorise(ctx context.Context, name string, op policy.Operation, encryptionContext map[string]string, payload uint64) (*key, error) {
	whole := name
	name = bounded(whole)
	k, decision := t.find(name, op, encryptionContext)
	if name != whole {
		k = nil // what is left of it may be the name of a key
	}
	t.record.Key, t.record.Context = name, encryptionContext
	t.decided(decision)
	if k != nil {
		t.record.Key = k.Name
	}
	if k == nil {
		// For the auditor only, who must not take the rule for the reason.
		t.record.Rule, t.note = "", "there is no key of this name"
	}
	if k == nil || !decision.Allowed {
		return nil, denied(name)
	}
	if err := t.count(ctx, decision, k.Name, payload); err != nil {
		return nil, err
	}
	t.bound(decision.MaxStale)
	t.record.Backend = k.group.id.backend
	return k, nil
}

// bounded is what of a name that somebody sent gets into the record.
func bounded(name string) string {
	if len(name) > maxKeyName {
		return strings.ToValidUTF8(name[:maxKeyName], "")
	}
	return name
}

// find looks a key up, by any of its names, and what policy says of it. It takes
// the same steps for a name that nobody has. The answer is the caller's to obey.
func (t *transaction) find(name string, op policy.Operation, encryptionContext map[string]string) (*key, policy.Decision) {
	k := t.state.keys[name]
	if k != nil {
		return k, t.decide(t.state, k, op, encryptionContext)
	}
	return nil, t.state.Policy.Decide(t.question(name, op, encryptionContext))
}

// decide asks policy for a key, or for none.
func (t *transaction) decide(st *state, k *key, op policy.Operation, encryptionContext map[string]string) policy.Decision {
	r := t.question("", op, encryptionContext)
	if k != nil {
		r.Key, r.Labels = k.Name, k.Labels
	}
	return st.Policy.Decide(r)
}

func (t *transaction) question(name string, op policy.Operation, encryptionContext map[string]string) policy.Request {
	return policy.Request{Caller: t.call.Caller, Operation: op, Key: name, Context: encryptionContext, Time: time.Now()}
}

// decided notes for the auditor which rule decided, and what could not be
// evaluated on the way.
func (t *transaction) decided(d policy.Decision) {
	t.record.Rule, t.note = d.Rule, ""
	for _, f := range d.Failures {
		if t.note != "" {
			t.note += "; "
		}
		t.note += f.String()
	}
}

// bound tightens how stale a key may be, as policy demands.
func (t *transaction) bound(limit *time.Duration) {
	if limit == nil {
		return
	}
	t.maxStale, t.policyStale = smaller(t.maxStale, limit), smaller(t.policyStale, limit)
}

// smaller returns the smaller bound; nil is none.
func smaller(a, b *time.Duration) *time.Duration {
	if a == nil || *b < *a {
		return b
	}
	return a
}

// used notes which key stands behind the answer, and returns it for the caller.
func (t *transaction) used(k *key, version string, f cache.Freshness) KeyUse {
	t.record.KeyVersion = version
	t.record.Freshness = audit.Freshness{
		Source:          f.Source.String(),
		AgeMillis:       f.Age.Milliseconds(),
		GraceLeftMillis: f.GraceLeft.Milliseconds(),
	}
	return KeyUse{Key: k.Name, Version: version, Freshness: f}
}

// finish writes the record of an operation that ended with err. Its own error
// replaces any answer.
func (t *transaction) finish(ctx context.Context, err error) error {
	r := &t.record
	r.Outcome, r.Reason, r.Detail = audit.Success, "", t.note
	if err != nil {
		r.Outcome, r.Reason, r.Detail = audit.Error, string(ReasonOf(err)), detailOf(err)
	}
	reason := ReasonOf(err)
	// Who is not known is denied, and counted so, also where a retry may help.
	unknown := reason == ReasonUnidentified || (reason == ReasonTooManyRequests && t.call.Caller.Proof == "")
	if unknown || reason == ReasonAccessDenied || reason == ReasonQuotaExceeded {
		r.Outcome = audit.Denied
	}
	if r.Outcome == audit.Denied && reason != ReasonQuotaExceeded && t.note != "" {
		r.Detail = t.note
	}
	r.DurationMicros = time.Since(t.began).Microseconds()
	unrecorded := t.write(ctx)
	if unrecorded != nil {
		r.Outcome, r.Reason = audit.Error, string(ReasonAuditUnavailable)
	}
	t.service.ended(ctx, r)
	t.held.Release()
	return unrecorded
}

// write hands the record to the audit log. The caller's own deadline does not
// count here: what was done must be recorded.
func (t *transaction) write(ctx context.Context) error {
	t.record.Time = time.Now()
	if err := t.service.audit.Write(context.WithoutCancel(ctx), &t.record); err != nil {
		return &Error{
			Reason: ReasonAuditUnavailable, Key: t.record.Key, Cause: err, RetryAfter: time.Second,
			Message: "the audit record cannot be written, so there is no answer; the agent's log, and kms-agent status on the host, say why",
		}
	}
	return nil
}

// Refuse records a request that never became an operation: its caller could
// not be identified, or it broke a limit of the door. It returns the error for
// the caller.
func (s *Service) Refuse(ctx context.Context, call Call, operation string, refusal *Error) error {
	t := s.begin(call, policy.Operation(operation))
	bound := *refusal
	bound.Key = bounded(refusal.Key) // as the caller wrote it
	t.record.Key = bound.Key
	if err := t.finish(ctx, &bound); err != nil {
		return err
	}
	return &bound
}

// detailOf is what an auditor needs to tell failures apart that look alike
// outside.
func detailOf(err error) string {
	var e *Error
	if errors.As(err, &e) && e.Cause != nil {
		return e.Cause.Error()
	}
	if e != nil {
		return e.Message
	}
	return err.Error()
}

func messageID(id [envelope.MessageIDSize]byte) string { return hex.EncodeToString(id[:]) }

func sortedKeys(m map[string]string) []string {
	if len(m) == 0 {
		return nil
	}
	return slices.Sorted(maps.Keys(m))
}
