package kms

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/agent/quota"
)

// limit puts the limits of a policy to use. It is the last step of Apply that can
// fail.
func (s *Service) limit(p *policy.Policy) (map[string]*quota.Rule, error) {
	limits := p.Limits()
	if s.quota == nil {
		if len(limits) > 0 {
			return nil, errors.New("kms: the policy has limits, and nothing counts them")
		}
		return nil, nil //nolint:nilnil // no limits is an ordinary answer
	}
	counted := make(map[string]quota.Limits, len(limits))
	for rule, l := range limits {
		counted[rule] = quotaLimits(l)
	}
	return s.quota.Configure(counted), nil
}

func quotaLimits(l *policy.Limits) quota.Limits {
	q := quota.Limits{Burst: int(l.BurstOrDefault())}
	if l.Rate != nil {
		q.Rate = l.Rate.PerSecond()
	}
	if l.PerDay != nil {
		q.PerDay = *l.PerDay
	}
	if l.BytesPerDay != nil {
		q.BytesPerDay = uint64(*l.BytesPerDay)
	}
	if l.Concurrency != nil {
		q.Concurrency = *l.Concurrency
	}
	return q
}

// count takes what the allowing rules of d limit: of all of them or of none.
func (t *transaction) count(ctx context.Context, d policy.Decision, key string, payload uint64) error {
	if len(d.Limited) == 0 {
		return nil
	}
	var space [4]*quota.Rule
	rules := space[:0]
	for _, name := range d.Limited {
		rule := t.state.limited[name]
		if rule == nil {
			return &Error{Reason: ReasonInternal, Key: key, Message: "a rule's limits are not counted; restart the agent", Cause: fmt.Errorf("rule %q", name)}
		}
		rules = append(rules, rule)
	}
	return t.uncounted(ctx, key, t.held.Take(ctx, t.arrived, rules, t.call.Caller.ID.String(), payload))
}

// uncounted turns why a limit did not admit the request into what the caller is
// told, and notes for the auditor which rule refused.
func (t *transaction) uncounted(ctx context.Context, key string, err error) error {
	if err == nil {
		return nil
	}
	e := &Error{Key: key, Cause: err}
	var exceeded *quota.Exceeded
	switch {
	case errors.As(err, &exceeded):
		t.record.Rule = exceeded.Rule
		e.Reason, e.RetryAfter = ReasonQuotaExceeded, exceeded.RetryAfter
		e.Message = fmt.Sprintf("the caller has used up its limit %s; retry later, or ask whoever keeps the agent's policy for more", exceeded.Limit)
		if e.RetryAfter == 0 {
			e.Message = fmt.Sprintf("this is more than the limit %s gives the caller in a whole day; split the data, or ask whoever keeps the agent's policy for more", exceeded.Limit)
		}
	case ctx.Err() != nil:
		return failure(ctx, key, err)
	default:
		e.Reason, e.RetryAfter = ReasonQuotaUnavailable, time.Second
		e.Message = "the caller's daily limit cannot be counted, because the count cannot be stored; `kms-agent status` on the host says why"
	}
	return e
}

// releaseUnless gives back what a stream that never began holds, after a panic
// too.
func (t *transaction) releaseUnless(begun *bool) {
	if !*begun {
		t.held.Release()
	}
}
