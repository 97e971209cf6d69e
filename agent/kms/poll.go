package kms

import (
	"context"
	"time"
)

const (
	// hedgeAfter is how long the first backend has for opening a data key before the
	// next is asked too, and how long one that was late the last time is waited for once
	// another has answered.
	hedgeAfter = 150 * time.Millisecond
	// stragglers is how long a wrap waits for further backends once enough of them
	// have wrapped.
	stragglers = time.Second
	// confirmStragglers is that of a confirmation. It is shorter than the patience of
	// those who wait for it: that one backend is slow must not look like an outage.
	confirmStragglers = 500 * time.Millisecond
)

// polling says how parts are asked.
type polling struct {
	ask func(ctx context.Context, part int) error
	// allowance is how long parts are waited for at most once one has said yes.
	allowance time.Duration
	// must tells of parts that are waited for whatever it takes; nil: of none.
	must func(part int) bool
	// late is told what a part said that was not waited for; it may be nil.
	late func(part int, err error)
}

// poll asks some parts at once and returns what they said, by part. A no is not made to
// wait for anything. Calls that are not waited for go on.
func (s *Service) poll(ctx context.Context, g *group, parts []int, p polling) map[int]error {
	errs := make(map[int]error, len(parts))
	if len(parts) == 1 { // as a rule: no goroutine is needed
		errs[parts[0]] = p.ask(ctx, parts[0])
		return errs
	}
	over := make(chan struct{})
	defer close(over)
	answers := s.askAll(ctx, parts, p, over)
	var enough <-chan time.Time
	for len(errs) < len(parts) {
		select {
		case a := <-answers:
			errs[a.part] = a.err
			if g.refuses(a.err) {
				return errs
			}
			if a.err == nil && enough == nil {
				timer := time.NewTimer(g.allowed(parts, errs, p.allowance))
				defer timer.Stop()
				enough = timer.C
			}
		case <-ctx.Done():
			return errs
		case <-enough:
			if !g.late(parts, errs, p.must) {
				return errs
			}
			enough = make(chan time.Time) // never
		}
	}
	return errs
}

type answer struct {
	part int
	err  error
}

// askAll asks parts at once. Their answers come from the channel until over is closed.
func (s *Service) askAll(ctx context.Context, parts []int, p polling, over <-chan struct{}) <-chan answer {
	answers := make(chan answer) // not buffered: who is not heard here is late
	for _, part := range parts {
		detached, done, err := s.strays.begin(ctx)
		ask := p.ask
		if err != nil {
			detached, done, ask = ctx, func() {}, func(context.Context, int) error { return err }
		}
		go func() {
			defer done()
			err := ask(detached, part)
			select {
			case answers <- answer{part, err}:
			case <-over:
				if p.late != nil {
					p.late(part, err)
				}
			}
		}()
	}
	return answers
}

// late notes the parts that have not answered in time, and tells whether one of them must
// be waited for.
func (g *group) late(parts []int, errs map[int]error, must func(part int) bool) (waits bool) {
	for _, part := range parts {
		if _, answered := errs[part]; !answered {
			g.parts[part].failing.Store(unanswered)
			waits = waits || must != nil && must(part)
		}
	}
	return waits
}

// allowed is how long parts that have not answered yet are waited for: not for long where
// all of them were late, or away, the last time too.
func (g *group) allowed(parts []int, errs map[int]error, allowance time.Duration) time.Duration {
	for _, part := range parts {
		if _, answered := errs[part]; !answered && g.parts[part].failing.Load() == 0 {
			return allowance
		}
	}
	return min(allowance, hedgeAfter)
}

// race asks parts one after the other, the next when one fails or takes its time, until
// one has answered or refused the key. discard is given the results that come too late.
func race[T any](ctx context.Context, s *Service, g *group, parts []int, ask func(ctx context.Context, part int) (T, error), discard func(T)) (result T, by int, errs map[int]error) {
	if len(parts) == 1 {
		result, err := ask(ctx, parts[0])
		if err != nil {
			return result, -1, map[int]error{parts[0]: err}
		}
		return result, parts[0], nil
	}
	type answer struct {
		part   int
		result T
		err    error
	}
	bounded, cancel := context.WithCancel(ctx)
	defer cancel()
	answers, over := make(chan answer), make(chan struct{})
	defer close(over)
	errs = map[int]error{}
	asked := 0
	next := func() {
		if asked == len(parts) || ctx.Err() != nil {
			return
		}
		part := parts[asked]
		asked++
		_, done, err := s.strays.begin(ctx)
		if err != nil {
			errs[part] = err
			return
		}
		go func() {
			defer done()
			result, err := ask(bounded, part)
			select {
			case answers <- answer{part, result, err}:
			case <-over:
				discard(result)
			}
		}()
	}
	hedge := time.NewTicker(hedgeAfter)
	defer hedge.Stop()
	for next(); len(errs) < asked; {
		select {
		case a := <-answers:
			errs[a.part] = a.err
			if a.err == nil {
				return a.result, a.part, errs
			}
			if g.refuses(a.err) {
				return result, -1, errs
			}
			next()
		case <-hedge.C:
			next()
		}
	}
	return result, -1, errs
}
