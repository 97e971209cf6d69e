// Package audit writes one record per operation, or reports that it could not.
//
// The records form a forward-secure chain: docs/audit.md specifies the fields
// and the chain so that a log can be verified without this package.
package audit

import "time"

// Kind says what a record stands for.
type Kind string

// The kinds of records.
const (
	// KindOperation is a whole operation, written before its answer.
	KindOperation Kind = "operation"
	// KindStart is written before the first byte of a stream is processed, or
	// before a change upstream.
	KindStart Kind = "start"
	// KindEnd belongs to a KindStart with the same request ID and is written
	// before success is reported.
	KindEnd Kind = "end"
	// KindEvent is something that happened to the agent or to this log.
	KindEvent Kind = "event"
)

// Outcome says how an operation ended.
type Outcome string

// The outcomes. A KindStart has none.
const (
	Success Outcome = "success"
	Denied  Outcome = "denied"
	Error   Outcome = "error"
)

// Record is one line of the log. Its JSON names are a promise: fields are
// added, never renamed or given another meaning; readers ignore what they do
// not know. Empty fields are left out of the line.
type Record struct {
	// Sequence counts the records of a chain from 1. Set by Log.Write.
	Sequence uint64 `json:"sequence"`
	// Time is UTC; Log.Write sets it when it is zero.
	Time time.Time `json:"time"`
	Kind Kind      `json:"kind"`
	// RequestID joins the records of one request.
	RequestID string `json:"request_id,omitempty"`
	// Door is the protocol that the request came by, such as "native".
	Door   string `json:"door,omitempty"`
	Caller Caller `json:"caller,omitzero"`
	// Operation is an operation's name, or an event's for KindEvent.
	Operation string `json:"operation,omitempty"`
	// Key is the logical key; of a re-encryption, the destination.
	Key        string `json:"key,omitempty"`
	KeyVersion string `json:"key_version,omitempty"`
	// Source is what a re-encryption decrypted with.
	Source *KeyUse `json:"source,omitempty"`
	// ContextKeys, ContextHMAC and Context are the encryption context. Callers
	// of Log.Write give Context; the log's ContextValues decides which of the
	// three is written.
	ContextKeys []string          `json:"context_keys,omitempty"`
	ContextHMAC map[string]string `json:"context_hmac,omitempty"`
	Context     map[string]string `json:"context,omitempty"`
	// MessageID is lowercase hexadecimal.
	MessageID string `json:"message_id,omitempty"`
	// Rule is the policy rule that decided; empty with Denied is the default deny.
	Rule    string  `json:"rule,omitempty"`
	Outcome Outcome `json:"outcome,omitempty"`
	// Reason is the documented reason of an error or denial; Detail is for
	// people and may say more than the caller was told. Never key material.
	Reason    string    `json:"reason,omitempty"`
	Detail    string    `json:"detail,omitempty"`
	Freshness Freshness `json:"freshness,omitzero"`
	Backend   string    `json:"backend,omitempty"`
	// DurationMicros is the time from the request's arrival to this record,
	// UpstreamMicros the part of it spent in backends.
	DurationMicros int64  `json:"duration_us,omitempty"`
	UpstreamMicros int64  `json:"upstream_us,omitempty"`
	BytesIn        uint64 `json:"bytes_in,omitempty"`
	BytesOut       uint64 `json:"bytes_out,omitempty"`
	// Count is how many equal requests this record stands for; 0 is one.
	Count uint64 `json:"count,omitempty"`
	// Since is when the first of them was, Time when the last; zero for one.
	Since time.Time `json:"since,omitzero"`
	// Log is set in the events that the log writes about itself, and ignored
	// by Log.Write.
	Log *LogEvent `json:"log,omitempty"`
}

// Caller is who asked. UID, GID and PID are the kernel's word about the process
// at the other end of the socket.
type Caller struct {
	SPIFFEID string `json:"spiffe_id,omitempty"`
	Proof    string `json:"proof,omitempty"`
	UID      uint32 `json:"uid"`
	GID      uint32 `json:"gid"`
	PID      int32  `json:"pid"`
}

// KeyUse names a key, how fresh it was, the message that it opened and the
// rule that allowed it.
type KeyUse struct {
	Key        string    `json:"key,omitempty"`
	KeyVersion string    `json:"key_version,omitempty"`
	Freshness  Freshness `json:"freshness,omitzero"`
	MessageID  string    `json:"message_id,omitempty"`
	Rule       string    `json:"rule,omitempty"`
}

// Freshness says how the key was known to be good: Source is "upstream",
// "cached" or "grace".
type Freshness struct {
	Source          string `json:"source,omitempty"`
	AgeMillis       int64  `json:"age_ms,omitempty"`
	GraceLeftMillis int64  `json:"grace_left_ms,omitempty"`
}

// LogEvent is what the log says about itself.
type LogEvent struct {
	// Chain identifies the initial key; in EventStarted.
	Chain string `json:"chain,omitempty"`
	// TornBytes and TornSHA256 tell which bytes before this record belong to
	// no record; in EventRecovered.
	TornBytes  uint64 `json:"torn_bytes,omitempty"`
	TornSHA256 string `json:"torn_sha256,omitempty"`
	// GapFrom and GapTo are the sequence numbers that this log may lack; in EventGap.
	GapFrom uint64 `json:"gap_from,omitempty"`
	GapTo   uint64 `json:"gap_to,omitempty"`
	// File is the name of a rotated file that is deleted with the records from
	// ExpiredFrom to ExpiredTo; in EventExpired.
	File        string `json:"file,omitempty"`
	ExpiredFrom uint64 `json:"expired_from,omitempty"`
	ExpiredTo   uint64 `json:"expired_to,omitempty"`
}

// The operations of the events that the log writes about itself.
const (
	// EventStarted is the first record of a chain.
	EventStarted = "audit-started"
	// EventContinued is the first record of a file that did not exist, or was
	// empty, when the agent started.
	EventContinued = "audit-continued"
	// EventRecovered follows bytes that a crash or a failed write left behind.
	EventRecovered = "audit-recovered"
	// EventGap says that records may be missing and who accepted that.
	EventGap = "audit-gap"
	// EventTruncated says that the log file shrank while it was open.
	EventTruncated = "audit-truncated"
	// EventResumed says that records could not be written for a while.
	EventResumed = "audit-resumed"
	// EventUnrecorded says how many operations were answered without a record,
	// which only happens with AnswerOnFailure.
	EventUnrecorded = "audit-unrecorded"
	// EventExpired says that a rotated file is deleted because it is older than
	// the retention.
	EventExpired = "audit-expired"
)
