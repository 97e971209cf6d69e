package cache_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// moment is what is said at one time of a story: upstream's answers from then on, or what
// a use of the data key must be told.
type moment struct {
	at   time.Duration
	says error // with does "upstream"
	does string
	// want is "cached", "upstream", "grace" or what is wrong; left the grace that is left.
	want string
	left time.Duration
}

func upstreamSays(at time.Duration, err error) moment {
	return moment{at: at, does: "upstream", says: err}
}

func used(at time.Duration, want string) moment { return moment{at: at, does: "use", want: want} }

func inGrace(at, left time.Duration) moment {
	return moment{at: at, does: "use", want: "grace", left: left}
}

// TestTheTable is the table of what is served and the formula of grace, row by row and
// at each boundary: max_age is 5m, grace an hour. Every story begins with a data key that
// upstream gave at 0.
func TestTheTable(t *testing.T) {
	const m, ns, edge = time.Minute, time.Nanosecond, 5 * time.Minute
	for name, story := range map[string][]moment{
		"yes, within max_age": {used(0, "cached"), used(edge, "cached")},
		"yes, older":          {used(edge+ns, "upstream"), used(edge+ns, "cached")},
		"away, within max_age": {
			upstreamSays(0, errDown), used(edge, "cached"),
		},
		"away, in grace: the outage begins with the first failed call, never later than max_age": {
			upstreamSays(0, errDown), inGrace(edge+ns, grace-ns), inGrace(30*m, edge+grace-30*m),
			inGrace(edge+grace-ns, ns), used(edge+grace, "down"),
		},
		"away, found out late": {
			upstreamSays(0, errDown), inGrace(50*m, edge+grace-50*m), inGrace(edge+grace-ns, ns), used(edge+grace, "down"),
		},
		"away, found out after grace": {upstreamSays(0, errDown), used(edge+grace, "down"), used(2*edge+grace, "down")},
		"away, grace over, back": {
			upstreamSays(0, errDown), inGrace(6*m, edge+grace-6*m), used(edge+grace, "down"),
			upstreamSays(2*time.Hour, nil), used(2*time.Hour, "upstream"), used(2*time.Hour+edge, "cached"),
		},
		"away a second time: a new outage has its own grace, counted from the last yes": {
			upstreamSays(0, errDown), inGrace(60*m, 5*m), upstreamSays(60*m, nil), moment{at: 60 * m, does: "confirm"},
			upstreamSays(60*m, errDown), inGrace(66*m, 59*m), inGrace(65*m+grace-ns, ns), used(65*m+grace, "down"),
		},
		"flapping without a yes for it: none of it adds time": {
			upstreamSays(0, errDown), inGrace(10*m, 55*m),
			upstreamSays(20*m, nil), moment{at: 20 * m, does: "confirm another"}, upstreamSays(20*m, errDown),
			inGrace(21*m, 44*m), inGrace(edge+grace-ns, ns), used(edge+grace, "down"),
		},
		"no, within max_age": {
			upstreamSays(m, errNo), moment{at: m, does: "observe no"}, used(m, "no"), used(2*m, "no"),
		},
		"no, older":    {upstreamSays(m, errNo), used(6*m, "no")},
		"no, in grace": {upstreamSays(0, errDown), inGrace(10*m, 55*m), upstreamSays(20*m, errNo), moment{at: 20 * m, does: "confirm"}, used(20*m, "no")},
		"no that nothing confirms, in grace: suspended, not destroyed": {
			upstreamSays(0, errDown), inGrace(10*m, 55*m), moment{at: 20 * m, does: "observe no"}, used(20*m, "suspended"), used(21*m, "suspended"),
			upstreamSays(22*m, nil), used(22*m, "upstream"),
		},
		"no, and then away: an outage does not undo it": {
			upstreamSays(m, errNo), moment{at: m, does: "observe no"}, used(m, "no"), upstreamSays(2*m, errDown), used(3*m, "no"), used(30*m, "no"),
		},
		"an error that is the caller's own begins no outage": {
			upstreamSays(0, errOther), used(6*m, "other"), used(7*m, "other"), upstreamSays(8*m, nil), used(8*m, "upstream"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(r *rig, a cache.Authority, use func() (cache.Freshness, error)) {
				f, err := use()
				r.wantSource("the first use", f, err, cache.Upstream)
				began := time.Now()
				for _, now := range story {
					time.Sleep(time.Until(began.Add(now.at)))
					r.live(now, a, use)
				}
			})
		})
	}
}

// live does what a moment says.
func (r *rig) live(now moment, a cache.Authority, use func() (cache.Freshness, error)) {
	r.t.Helper()
	switch now.does {
	case "upstream":
		r.up.say(now.says, now.says)
	case "confirm":
		zero := time.Duration(0)
		_, _ = r.Renew(r.t.Context(), a, cache.Limits{MaxAge: time.Hour}, &zero)
		synctest.Wait()
	case "confirm another":
		other := a
		other.Version = "2"
		if _, err := r.Renew(r.t.Context(), other, cache.Limits{MaxAge: time.Hour}, nil); err != nil {
			r.t.Errorf("at %v: the other version: %v", now.at, err)
		}
	case "observe no":
		r.Observe(a, cache.No, nil, r.Now())
		synctest.Wait()
	case "use":
		f, err := use()
		if got := worded(f, err); got != now.want || now.want == "grace" && f.GraceLeft != now.left {
			r.t.Errorf("at %v: %s (%v, %v); want %s, %v left", now.at, got, f, err, now.want, now.left)
		}
	}
}

func worded(f cache.Freshness, err error) string {
	switch {
	case err == nil:
		return f.Source.String()
	case errors.Is(err, errNo):
		return "no"
	case errors.Is(err, cache.ErrSuspended):
		return "suspended"
	case errors.Is(err, errDown):
		return "down"
	case errors.Is(err, errOther):
		return "other"
	}
	return fmt.Sprint(err)
}
