package host

import (
	"time"

	"github.com/kms-agent/kms-agent/plugins"
)

// State is the state of a backend's process.
type State string

// The states.
const (
	// Starting: no process has been up yet, or a replacement is being started.
	Starting State = "starting"
	// Up: the process serves.
	Up State = "up"
	// Degraded: the process runs and gets calls, but the last of them was
	// Unavailable, Unauthenticated or Internal, or its last Check failed.
	Degraded State = "degraded"
	// Down: there is no process: its start failed, it died, or Run ended.
	Down State = "down"
)

// Status is what is known of a backend's process.
type Status struct {
	Name  string
	State State
	PID   int       // 0 without a process
	Since time.Time // of the state
	// Restarts counts the processes after the first.
	Restarts uint64
	// Calls counts the calls, Failures those that ended Unavailable,
	// Unauthenticated or Internal before their caller gave up.
	Calls, Failures uint64
	// Retries counts the calls that were made a second time.
	Retries uint64
	// Breaker is what keeps calls from a backend that cannot serve them. Those it
	// refused are in Calls, and not in Failures.
	Breaker BreakerStatus
	// LastError is why the state is Degraded or Down, or was last.
	LastError string
	// Plugin is what the last opened process said of itself.
	Plugin plugins.Info
	// Confined: the process reaches only what Config.Access names.
	Confined bool
	// SHA256 is the configured digest of the program; empty with Self.
	SHA256 string
}

// BreakerStatus is what is known of a breaker.
type BreakerStatus struct {
	Circuit Circuit
	// Since is when it closed, or when it opened first since then.
	Since time.Time
	// FailureRate is the share of failed and slow calls in the last ten seconds, 0 to 1.
	FailureRate float64
	// Refused counts the calls that were not made, Opened how often it opened.
	Refused, Opened uint64
	// Next is before when no call will be made; zero where calls are made.
	Next time.Time
}
