package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/kms-agent/kms-agent/agent"
	"github.com/kms-agent/kms-agent/agent/audit"
)

// auditVerify is what audit verify was asked for.
type auditVerify struct {
	initialKey, config, checkpoints string
	options                         audit.VerifyOptions
}

func newAudit(a *app) *cobra.Command {
	c := group("audit", "Verify the audit log, or let it go on after a loss", "")
	v := auditVerify{}
	verify := &cobra.Command{
		Use:   "verify [FILE|DIRECTORY...]",
		Short: "Check that an audit log is whole and unchanged",
		Long: `Checks every record of an audit log against the initial key of its chain: that
none was changed, removed, inserted or put into another order. Name the files of
the log in any order, or their directory; .gz files are decompressed. With
--config alone, the log and its rotated files beside it are taken. - is standard
input, and must be alone.

Records of files that the agent deleted after their retention are told apart
from others that are missing: a later record must say so.

That the newest records were not cut off, only something outside the log can
tell: --checkpoints takes a file with the checkpoints that the agent sent away
(audit.checkpoints), as the receiver stored them; --at-least takes a sequence
number that the log is known to have reached (kms-agent status prints it).`,
		Example: `  kms-agent audit verify --initial-key audit.key /var/log/kms-agent/audit.log
  kms-agent audit verify --initial-key audit.key /var/log/kms-agent
  kms-agent audit verify --config /etc/kms-agent/config.yaml`,
		Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error { return a.verifyAudit(c.Context(), v, args) },
	}
	verify.Flags().StringVar(&v.initialKey, "initial-key", "", "file with the first key of the chain")
	verify.Flags().StringVar(&v.config, "config", "", "take the log and its initial key from this configuration")
	verify.Flags().StringVar(&v.checkpoints, "checkpoints", "", "file with checkpoints of the log, among other lines or not")
	verify.Flags().Uint64Var(&v.options.From, "from", 1, "sequence number of the first record given")
	verify.Flags().Uint64Var(&v.options.AtLeast, "at-least", 0, "sequence number that the log is known to have reached")
	verify.Flags().BoolVar(&v.options.AllowGaps, "allow-gaps", false, "report gaps that an administrator accepted, and go on behind them")
	a.outputFlag(verify)
	c.AddCommand(verify, newAcceptGap(a))
	return c
}

func newAcceptGap(a *app) *cobra.Command {
	var config, reason string
	c := &cobra.Command{
		Use:   "accept-gap",
		Short: "Let a log go on that lacks records, and leave a record of it",
		Long: `An agent whose audit log lacks records that its state knows of does not start.
When the missing file can be put back, do that. When it is lost, this writes a
record that says which records may be missing, and why, for ever: audit verify
reports it. The agent must not be running.`,
		Example: `  kms-agent audit accept-gap --config /etc/kms-agent/config.yaml --reason "disk of host-17 replaced"`,
		Args:    exactly(),
		RunE: func(*cobra.Command, []string) error {
			if reason == "" {
				return usagef("say --reason: it stands in the audit log for ever")
			}
			cfg, err := agent.LoadConfig(config)
			if err != nil {
				return err
			}
			if err := audit.AcceptGap(cfg.AuditLog(), reason); err != nil {
				return err
			}
			a.note("the gap is on record in %s; the agent can be started", cfg.Audit.File)
			return nil
		},
	}
	c.Flags().StringVar(&config, "config", defaultConfigPath, "the configuration of the agent whose log it is")
	c.Flags().StringVar(&reason, "reason", "", "why records are missing, for those who will read the log")
	return c
}

func (a *app) verifyAudit(ctx context.Context, v auditVerify, logs []string) error {
	if v.config != "" {
		cfg, err := agent.LoadConfig(v.config)
		if err != nil {
			return err
		}
		if v.initialKey == "" {
			v.initialKey = cfg.Audit.InitialKey
		}
		if len(logs) == 0 {
			if logs, err = audit.LogFiles(cfg.Audit.File); err != nil {
				return err
			}
		}
	}
	if v.initialKey == "" || len(logs) == 0 {
		return usagef("name --initial-key and the log's files, or --config")
	}
	text, err := os.ReadFile(v.initialKey)
	if err != nil {
		return fmt.Errorf("read the initial key: %w", err)
	}
	key, err := audit.ParseInitialKey(text)
	clear(text)
	if err != nil {
		return &codedError{code: exitInvalid, prefix: "initial key " + v.initialKey + ": ", err: err}
	}
	defer clear(key)
	if v.checkpoints != "" {
		if v.options.Checkpoints, err = a.readCheckpoints(ctx, v.checkpoints); err != nil {
			return err
		}
	}
	report, err := interruptible(ctx, func() (audit.Report, error) { return a.verifyFiles(ctx, key, v.options, logs) })
	if err != nil {
		return err
	}
	return a.reportAudit(report)
}

func (a *app) readCheckpoints(ctx context.Context, path string) ([]audit.Checkpoint, error) {
	in, err := a.openInput(ctx, path)
	if err != nil {
		return nil, err
	}
	found, err := audit.ParseCheckpoints(in)
	if err = errors.Join(err, in.Close()); err != nil {
		return nil, fmt.Errorf("read the checkpoints: %w", err)
	}
	if len(found) == 0 {
		return nil, &codedError{code: exitInvalid, err: fmt.Errorf("%s holds no checkpoint", path),
			hint: "a checkpoint is the JSON that begins with {\"checkpoint\": as the agent sent it"}
	}
	return found, nil
}

func (a *app) verifyFiles(ctx context.Context, key []byte, o audit.VerifyOptions, logs []string) (audit.Report, error) {
	if !slices.Contains(logs, "-") {
		return audit.VerifyFiles(key, o, logs...)
	}
	if len(logs) > 1 {
		return audit.Report{}, usagef("- is the whole log on standard input; name files alone, or nothing but -")
	}
	in, err := a.openInput(ctx, "-")
	if err != nil {
		return audit.Report{}, err
	}
	report, err := audit.Verify(key, o, audit.Input{Name: "-", Reader: in})
	return report, errors.Join(err, in.Close())
}

func (a *app) reportAudit(report audit.Report) error {
	err := a.print(report, func(t *table) {
		t.row("chain", orDash(report.Chain))
		t.row("records", fmt.Sprint(report.Records))
		if report.Records > 0 {
			t.row("first", fmt.Sprintf("%d  %s", report.First, when(report.FirstTime)))
			t.row("last", fmt.Sprintf("%d  %s", report.Last, when(report.LastTime)))
		}
		if n := report.Checkpoints + report.CheckpointsIgnored; n > 0 {
			t.row("checkpoints", fmt.Sprintf("%d agree, %d of another log or forged", report.Checkpoints, report.CheckpointsIgnored))
		}
		for _, e := range report.Expired {
			t.row("expired", fmt.Sprintf("records %d to %d: deleted after their retention, as a record says", e.From, e.To))
		}
		for _, name := range report.Ignored {
			t.row("ignored", name+": no audit log")
		}
		for _, g := range report.Gaps {
			t.row("gap", fmt.Sprintf("%s:%d: records %d to %d may be missing: %s", g.File, g.Line, g.From, g.To, g.Reason))
		}
		switch {
		case !report.OK():
			t.row("result", "NOT VALID")
		case report.TailUnproven && report.Proven > 0:
			t.row("result", fmt.Sprintf("whole and unchanged up to the last record, and proven up to record %d; tail unproven: records after the last may have been cut off", report.Proven))
		case report.TailUnproven:
			t.row("result", "whole and unchanged up to the last record; tail unproven: records after it may have been cut off")
		default:
			t.row("result", "whole and unchanged")
		}
	})
	if err != nil || report.OK() {
		return err
	}
	hint := "the records before that line are sound; keep the log as evidence"
	if f := report.Fault; f != nil {
		return &codedError{code: exitInvalid, hint: hint, err: fmt.Errorf("%s:%d: %s: %s", f.File, f.Line, f.Reason, f.Detail)}
	}
	return &codedError{code: exitInvalid, hint: "--allow-gaps verifies what is there all the same",
		err: fmt.Errorf("records are missing, in %d places where an administrator accepted that", len(report.Gaps))}
}
