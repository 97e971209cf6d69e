// Package kms performs key operations for an identified caller.
package kms

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/census"
	"github.com/kms-agent/kms-agent/agent/quota"
	"github.com/kms-agent/kms-agent/agent/random"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/identity"
)

// Limits of what callers may ask for.
const (
	// MaxWrapSize is how many bytes Wrap takes at most.
	MaxWrapSize = 4096
	// MaxRandomSize is how many bytes GenerateRandom gives at most.
	MaxRandomSize = 64 << 10
	// MaxPageSize is how many keys one page of ListKeys holds at most.
	MaxPageSize = 1000
)

// Call says who asks, through which door, and on what terms.
type Call struct {
	Caller identity.Caller
	// Door names the protocol: "native", "admin".
	Door string
	// RequestID stands in the audit record and in the answer.
	RequestID string
	// MaxStale bounds the age of the last upstream confirmation; nil: no bound
	// beyond the key's own; zero: confirmed by a call that began after this one.
	MaxStale *time.Duration
	// Recheck proves the caller again; streams call it periodically. nil: the
	// proof cannot end.
	Recheck func() error
}

// Options are what a Service needs for its whole life.
type Options struct {
	// Audit receives one record for each operation, before its answer.
	Audit *audit.Log
	// Quota counts the limits of rules. nil: a policy with limits is refused.
	Quota *quota.Keeper
	// Census counts which wraps messages carry; nil counts nothing.
	Census *census.Census
	// Random makes data keys, and what GenerateRandom gives. nil: the system's alone.
	Random *random.Pool
	// MaxEntries bounds the data-key cache, both directions together.
	MaxEntries int
	// Now is CLOCK_BOOTTIME: a suspended host does not stretch a limit.
	Now func() time.Duration
	// Store is where data keys of keys whose Limits say so outlive the process; what
	// only the Service knows of them it adds itself. nil: nowhere.
	Store *cache.StoreConfig
	// ConfirmTimeout bounds one confirmation upstream.
	ConfirmTimeout time.Duration
	// RecheckInterval is how often a stream asks again whether it may go on.
	RecheckInterval time.Duration
	// Observe is told of every operation that ended, as its record says, before
	// the answer goes out. It must not block, keep the record or change it. The
	// context is the operation's.
	Observe func(context.Context, *audit.Record)
	// Outage is told when a backend has not answered for a while, and when it does
	// again. It may be nil, and must not block for long.
	Outage func(cache.Outage)
	// Alarm is told of what an operator must look at: a backend that lies, an
	// own canary that does not open. It must not block.
	Alarm func(message string, err error, backend, wrappingKey string)
}

// Service performs key operations. It is safe for concurrent use. Its
// configuration is one immutable state that Apply replaces; an operation loads
// it once.
type Service struct {
	audit   *audit.Log
	quota   *quota.Keeper // nil: no limits
	census  *census.Census
	random  *random.Pool
	cache   *cache.Cache
	now     func() time.Duration
	recheck time.Duration
	alarm   func(string, error, string, string)
	ended   func(context.Context, *audit.Record)
	// partitionKey makes the partition identifiers of this process: random, so
	// that they tell nobody who the writer was.
	partitionKey [32]byte
	state        atomic.Pointer[state]
	frames       largeFrames
	strays       *strays

	mu        sync.Mutex // guards wrappings and groups
	wrappings map[wrappingID]*wrapping
	groups    map[wrappingID]*group
}

// New returns a Service that knows no keys until Apply. Run must be running
// for keys to be refreshed ahead of their age.
func New(o Options) (*Service, error) {
	if o.Audit == nil || o.Now == nil {
		return nil, errors.New("kms: audit log and clock are required")
	}
	s := &Service{
		audit: o.Audit, quota: o.Quota, census: o.Census, random: o.Random, now: o.Now, recheck: o.RecheckInterval, alarm: o.Alarm, ended: o.Observe,
		wrappings: map[wrappingID]*wrapping{}, groups: map[wrappingID]*group{}, frames: largeFrames{byCaller: map[string]uint64{}}, strays: newStrays(),
	}
	if s.recheck <= 0 {
		s.recheck = 5 * time.Second
	}
	if s.alarm == nil {
		s.alarm = func(string, error, string, string) {}
	}
	if s.ended == nil {
		s.ended = func(context.Context, *audit.Record) {}
	}
	_, _ = rand.Read(s.partitionKey[:]) // never fails: crypto/rand
	c, err := cache.New(cache.Config{
		Now: o.Now, MaxEntries: o.MaxEntries, Classify: verdictOf,
		Confirm: s.confirm, ConfirmTimeout: o.ConfirmTimeout, OnOutage: o.Outage,
		Store: s.storeConfig(o.Store),
	})
	if err != nil {
		return nil, fmt.Errorf("kms: %w", err)
	}
	s.cache = c
	s.state.Store(emptyState())
	return s, nil
}

// Run refreshes confirmations ahead of their age, forgets what expired and asks about keys
// that are not well. It returns when ctx ends.
func (s *Service) Run(ctx context.Context) error {
	var attending sync.WaitGroup
	attending.Go(func() { s.attendAlways(ctx) })
	defer attending.Wait()
	return s.cache.Run(ctx)
}

// Close saves what the store is to have, and destroys every data key. Operations after
// it fail.
func (s *Service) Close() {
	s.strays.stop()
	s.cache.Close()
	s.strays.wait()
}

// Stats tells the state of the data-key cache.
func (s *Service) Stats() cache.Stats { return s.cache.Stats() }

// Outages tells of the backends that do not answer.
func (s *Service) Outages() []cache.Outage { return s.cache.Outages() }
