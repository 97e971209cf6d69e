package policy

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"time"
)

// Limits bound what each caller may do under one rule. Nil is no limit. What
// counts them is not part of this package.
type Limits struct {
	// Rate is how many requests there may be in the long run, and Burst how many
	// of them may come at once; without Burst it is what Rate gives in a second, 1
	// at least.
	Rate  *Rate   `yaml:"rate"`
	Burst *uint64 `yaml:"burst"`
	// PerDay and BytesPerDay are for one day of UTC: requests, and bytes of
	// payload.
	PerDay      *uint64 `yaml:"per_day"`
	BytesPerDay *Bytes  `yaml:"bytes_per_day"`
	// Concurrency is how many requests and streams may be under way at once.
	Concurrency *uint64 `yaml:"concurrency"`
}

// Bytes is a number of bytes.
type Bytes uint64

// Bounds of limits.
const (
	maxRate        = 1_000_000_000
	maxBurst       = 1_000_000_000
	maxPerDay      = 1_000_000_000_000_000
	maxBytesPerDay = 1 << 60
	maxConcurrency = 1_000_000
)

// Rate is a number of requests in a time: a second, a minute or an hour.
type Rate struct {
	Count uint64
	Per   time.Duration
}

// UnmarshalText reads a rate such as 500/s, 30/m or 1000/h.
func (r *Rate) UnmarshalText(text []byte) error {
	count, unit, _ := strings.Cut(string(text), "/")
	n, err := strconv.ParseUint(count, 10, 64)
	per := map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}[unit]
	if err != nil || per == 0 {
		return errors.New("write a whole number and /s, /m or /h")
	}
	*r = Rate{Count: n, Per: per}
	return nil
}

// String writes r as UnmarshalText reads it.
func (r Rate) String() string {
	unit := map[time.Duration]string{time.Second: "s", time.Minute: "m", time.Hour: "h"}[r.Per]
	return strconv.FormatUint(r.Count, 10) + "/" + unit
}

// PerSecond is the rate in requests per second.
func (r Rate) PerSecond() float64 { return float64(r.Count) / r.Per.Seconds() }

// BurstOrDefault is how many requests may come at once under l's Rate.
func (l *Limits) BurstOrDefault() uint64 {
	switch {
	case l.Burst != nil:
		return *l.Burst
	case l.Rate != nil:
		return max(1, uint64(math.Ceil(l.Rate.PerSecond())))
	}
	return 0
}

// String lists the limits as the configuration writes them; empty for none.
func (l *Limits) String() string {
	if l == nil {
		return ""
	}
	var parts []string
	add := func(name, value string) { parts = append(parts, name+" "+value) }
	if l.Rate != nil {
		add("rate", l.Rate.String())
		add("burst", strconv.FormatUint(l.BurstOrDefault(), 10))
	}
	for _, limit := range []struct {
		name  string
		value *uint64
	}{{"per_day", l.PerDay}, {"bytes_per_day", (*uint64)(l.BytesPerDay)}, {"concurrency", l.Concurrency}} {
		if limit.value != nil {
			add(limit.name, strconv.FormatUint(*limit.value, 10))
		}
	}
	return strings.Join(parts, ", ")
}

// limits checks the rule's limits and copies them, which are the configuration's.
func limits(r *Rule, report reporter) *Limits {
	l := r.Limits
	switch {
	case l == nil:
		return nil
	case r.Effect == Deny:
		report("limits", "a deny has no limits: it allows nothing that could be counted; remove them")
	case *l == Limits{}:
		report("limits", "names no limit; write some of: rate, burst, per_day, bytes_per_day, concurrency")
	}
	if l.Burst != nil && l.Rate == nil {
		report("limits.burst", "stands without rate, which it belongs to; write rate too, such as 500/s")
	}
	if l.Rate != nil {
		within("limits.rate", &l.Rate.Count, maxRate, report)
	}
	within("limits.burst", l.Burst, maxBurst, report)
	within("limits.per_day", l.PerDay, maxPerDay, report)
	within("limits.bytes_per_day", (*uint64)(l.BytesPerDay), maxBytesPerDay, report)
	within("limits.concurrency", l.Concurrency, maxConcurrency, report)
	return &Limits{
		Rate: clone(l.Rate), Burst: clone(l.Burst), PerDay: clone(l.PerDay),
		BytesPerDay: clone(l.BytesPerDay), Concurrency: clone(l.Concurrency),
	}
}

func clone[T any](p *T) *T {
	if p == nil {
		return nil
	}
	value := *p
	return &value
}

// within reports a limit that refuses everything, or is none.
func within(field string, value *uint64, most uint64, report reporter) {
	switch {
	case value == nil:
	case *value == 0:
		report(field, "0 would refuse every request; write a deny for that, or remove the line for no limit")
	case *value > most:
		report(field, "is more than %d; write less, or remove the line for no limit", most)
	}
}

// Limits returns the limits of every rule that has some, by the rule's name. The
// map is the caller's, what it points to is not to be changed.
func (p *Policy) Limits() map[string]*Limits {
	all := map[string]*Limits{}
	if p == nil {
		return all
	}
	for i := range p.rules {
		if r := &p.rules[i]; r.limits != nil {
			all[r.name] = r.limits
		}
	}
	return all
}
