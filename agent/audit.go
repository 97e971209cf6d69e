package agent

import (
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/kms-agent/kms-agent/agent/audit"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// remindEvery is how often the log says again that operations are answered
// without a record.
const remindEvery = 10 * time.Minute

func (a *Agent) auditStatus(cfg *Config) *adminv1.AuditStatus {
	s := a.audit.Status()
	r := &adminv1.AuditStatus{
		File: cfg.Audit.File, Sequence: s.Sequence, Refused: s.Refused, RotationError: s.RotationError,
		OnFailure: string(cfg.Audit.OnFailure), Unrecorded: s.Unrecorded, Coalesced: s.Coalesced,
	}
	if s.Failing {
		r.LastError = s.LastError
	}
	for _, sink := range s.Sinks {
		r.Sinks = append(r.Sinks, sinkStatus(sink))
	}
	if s.Checkpoints != nil {
		r.Checkpoints = sinkStatus(*s.Checkpoints)
	}
	return r
}

func sinkStatus(s audit.SinkStatus) *adminv1.AuditSink {
	return &adminv1.AuditSink{
		Name: s.Name, Format: string(s.Format), Required: s.Required, Written: s.Written, Lost: s.Lost, LastError: s.LastError,
	}
}

// auditProblems says what is wrong with the records.
func auditProblems(r *adminv1.AuditStatus) []string {
	var problems []string
	if r.GetLastError() != "" {
		problems = append(problems, "audit: "+r.GetLastError())
	}
	if r.GetOnFailure() == string(OnFailureAnswer) {
		problems = append(problems, fmt.Sprintf("audit.on_failure is answer: %d operations were answered without a record", r.GetUnrecorded()))
	}
	if r.GetRotationError() != "" {
		problems = append(problems, "audit: "+r.GetRotationError())
	}
	for _, s := range r.GetSinks() {
		if s.GetLastError() != "" {
			problems = append(problems, "audit sink "+s.GetName()+": "+s.GetLastError())
		}
	}
	if s := r.GetCheckpoints(); s.GetLastError() != "" {
		problems = append(problems, "audit checkpoints, "+s.GetName()+": "+s.GetLastError())
	}
	return problems
}

// silent says whether operations are refused because they cannot be recorded.
func silent(r *adminv1.AuditStatus) bool {
	return r.GetLastError() != "" && r.GetOnFailure() != string(OnFailureAnswer)
}

// auditWatch logs what is lost.
type auditWatch struct {
	logger   *zap.Logger
	reminded time.Time
	last     *adminv1.AuditStatus
}

// look compares with what it saw before.
func (w *auditWatch) look(now *adminv1.AuditStatus) {
	if now.GetOnFailure() == string(OnFailureAnswer) &&
		(w.reminded.IsZero() || time.Since(w.reminded) >= remindEvery || now.GetUnrecorded() > w.last.GetUnrecorded()) {
		w.logger.Warn("operations are answered also when they cannot be recorded: audit.on_failure is answer",
			zap.Uint64("unrecorded", now.GetUnrecorded()))
		w.reminded = time.Now()
	}
	places := func(r *adminv1.AuditStatus) []*adminv1.AuditSink {
		return append(slices.Clone(r.GetSinks()), r.GetCheckpoints())
	}
	before := places(w.last)
	for i, s := range places(now) {
		if len(before) <= i {
			before = append(before, nil) // the first look
		}
		if lost := s.GetLost() - before[i].GetLost(); lost > 0 {
			w.logger.Warn("audit records did not reach a sink; the audit log has them", zap.String("sink", s.GetName()),
				zap.Uint64("lost", lost), zap.String("error", s.GetLastError()))
		}
	}
	w.last = now
}
