// Package renew makes new messages of the old ones in trees of files. Each file
// is whole at every moment, the old message or the new one, and no plaintext is
// ever written to one.
package renew

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kms-agent/kms-agent/client"
)

// Options say which messages become which, and how.
type Options struct {
	Settings
	// Expected pairs must all stand in the old message's context.
	Expected map[string]string
	// MaxStale bounds how old the keys' confirmations may be; nil: no bound.
	MaxStale *time.Duration

	Filter Filter

	// DryRun looks and counts, and changes nothing.
	DryRun bool
	// Verify decrypts each new message and its old one, and compares them, before
	// the new one takes the place.
	Verify bool
	// NoStream refuses what the agent cannot do inside itself for its length,
	// where otherwise plaintext passes through this process.
	NoStream bool
	// KeepTimes keeps the times of the last change and access.
	KeepTimes bool
	// BreakHardLinks replaces files that have other names too; those names keep
	// the old message.
	BreakHardLinks bool
	// FailFast ends the run with the first failure.
	FailFast bool

	// Jobs is how many files are under way at a time, 1 at least.
	Jobs int
	// Timeout bounds one call, and the time in which nothing of a stream moves.
	Timeout time.Duration
	// Wait bounds how long an agent, or a backend of it, that does not answer is
	// waited for.
	Wait time.Duration

	// State remembers; nil: nothing is.
	State *State
	// Progress counts while Run runs; nil: nobody looks.
	Progress *Progress
	// Renewed is told of each file, by several goroutines at once; nil: nobody is.
	Renewed func(path string, from, to Label)
}

// Settings are the part of the options that a state file belongs to.
type Settings struct {
	// ToKey is the key of the new messages; "": that of the old one.
	ToKey string `json:"to_key,omitempty"`
	// NewContext replaces the context where ReplaceContext is set.
	NewContext     map[string]string `json:"new_context,omitempty"`
	ReplaceContext bool              `json:"replace_context,omitempty"`
	// All renews also messages that are as they should be.
	All bool `json:"all,omitempty"`
}

// StoppedError ends a run before it has seen every file, because going on makes
// no sense.
type StoppedError struct{ Err error }

// Error says why.
func (e *StoppedError) Error() string { return "stopped: " + e.Err.Error() }

// Unwrap gives what failed.
func (e *StoppedError) Unwrap() error { return e.Err }

// ErrFailed means that the run has seen every file and some of them failed.
var ErrFailed = errors.New("some files were not renewed")

// run is one run under way.
type run struct {
	Options
	agent    *client.Client
	began    time.Time
	patience *patience
	targets  targets
	tally    tally
	// end ends the context of the run, after which no file is begun any more.
	end context.CancelCauseFunc
	// tooLarge is the least size that the agent has refused to take at once.
	tooLarge atomic.Int64
}

// Run renews what paths name, files or directories with all below. The summary
// is nil where the run has not begun. The error is nil when everything was done, ErrFailed,
// *StoppedError, or that of ctx; then the files that were under way are done.
func Run(ctx context.Context, agent *client.Client, o Options, paths []string) (*Summary, error) {
	starts, err := resolve(paths)
	if err != nil {
		return nil, err
	}
	defer starts.close()
	stop, end := context.WithCancelCause(ctx)
	defer end(nil)
	if o.Progress == nil {
		o.Progress = &Progress{}
	}
	r := &run{Options: o, agent: agent, began: time.Now(), end: end, patience: newPatience(o.Wait, o.Progress)}
	r.tooLarge.Store(MaxInside + 1)
	if !o.DryRun {
		if err := r.greet(ctx); err != nil {
			return nil, err
		}
	}
	r.walk(stop, starts)
	return r.finish(ctx, context.Cause(stop))
}

// greet finds out whether the agent can be reached before any file is opened:
// what is wrong from the start is told at once.
func (r *run) greet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	_, err := r.agent.WhoAmI(ctx)
	return err
}

// walk gives every file to one of the workers and waits for them.
func (r *run) walk(ctx context.Context, starts starts) {
	jobs := make(chan job)
	var workers sync.WaitGroup
	for range r.Jobs {
		workers.Go(func() {
			for j := range jobs {
				r.one(ctx, j)
				j.in.release()
			}
		})
	}
	w := walker{
		filter: &r.Filter, skip: r.skipped, fail: r.failed,
		found: func(j job) {
			j.in.retain()
			select {
			case jobs <- j:
			case <-ctx.Done():
				j.in.release()
			}
		},
	}
	w.all(ctx, starts)
	close(jobs)
	workers.Wait()
}

// finish decides how the run ended.
func (r *run) finish(ctx context.Context, cause error) (*Summary, error) {
	summary := r.tally.summary(r.DryRun)
	if r.State != nil {
		if err := r.State.Sync(); err != nil {
			return summary, &StoppedError{err}
		}
	}
	var stopped *StoppedError
	switch {
	case errors.As(cause, &stopped):
		return summary, stopped
	case ctx.Err() != nil:
		return summary, ctx.Err()
	case summary.Counts[Failed].Files > 0:
		return summary, ErrFailed
	}
	return summary, nil
}

// skipped counts what is left as it is.
func (r *run) skipped(o Outcome, size int64) {
	r.tally.add(o, size)
	r.Progress.add(size)
}

// failed counts a failure, remembers it, and ends the run where it is to.
func (r *run) failed(path string, size int64, err error) {
	f := failureOf(path, err)
	r.tally.fail(f, size)
	r.Progress.add(size)
	r.Progress.failed.Add(1)
	r.remember(Record{Path: path, Outcome: Failed, Reason: f.Reason, Message: f.Message})
	switch {
	case r.FailFast:
		r.end(&StoppedError{err})
	case noRoom(err):
		r.end(&StoppedError{err}) // the next file would fail as well
	}
}

// remember writes to the state file. A run that cannot remember ends.
func (r *run) remember(record Record) {
	if r.State == nil || r.DryRun {
		return
	}
	if err := r.State.Append(record); err != nil {
		r.end(&StoppedError{err})
	}
}

// begun is the context of a call: a file that was begun is finished, whatever
// ends the run.
func (r *run) begun(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), r.Timeout)
}

// Request asks the agent to make the new message of one that it takes at once.
func (o *Options) Request(message []byte) *client.ReEncryptRequest {
	return &client.ReEncryptRequest{
		Message: message, ExpectedContext: o.Expected, MaxStale: o.maxStale(),
		DestinationKey: o.ToKey, DestinationContext: o.NewContext, ReplaceContext: o.ReplaceContext,
	}
}

// contextOf is the context of the new message of one with context old.
func (s *Settings) contextOf(old map[string]string) map[string]string {
	if s.ReplaceContext {
		return s.NewContext
	}
	return old
}
