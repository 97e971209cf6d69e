package renew

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// one does everything with one file.
func (r *run) one(ctx context.Context, j job) {
	if ctx.Err() != nil {
		return
	}
	outcome, err := r.consider(ctx, j)
	var stopped *StoppedError
	switch {
	case err == nil:
		r.skipped(outcome, j.was.size)
	case errors.Is(err, errLeft):
	case errors.As(err, &stopped):
		r.end(stopped)
	default:
		r.failed(j.path(), j.was.size, err)
	}
}

// consider opens a file and renews it if it is one to renew.
func (r *run) consider(ctx context.Context, j job) (Outcome, error) {
	if r.doneBefore(j) {
		return DoneBefore, nil
	}
	source, was, err := j.open()
	if err != nil {
		return "", err
	}
	defer func() { _ = source.Close() }()
	old, err := readHeading(source)
	switch {
	case errors.Is(err, errDamaged):
		return "", fail(ReasonDamaged, err)
	case errors.Is(err, errForeign):
		return Foreign, nil
	case err != nil:
		return "", fail(ReasonUnreadable, err)
	}
	r.tally.saw(old.label, was.size)
	outcome, err := r.decide(ctx, &piece{job: job{j.in, j.name, was}, source: source, old: old})
	if err != nil && !errors.Is(err, errLeft) {
		if now, lookErr := snapshotFile(source); lookErr == nil && !now.sameContent(was) {
			err = fail(ReasonChanged, errChanged) // which explains whatever was wrong with it
		}
	}
	return outcome, err
}

// decide renews a message where it is one to renew.
func (r *run) decide(ctx context.Context, p *piece) (Outcome, error) {
	meant, err := r.Filter.means(p.old.label)
	if err != nil || !meant {
		return NotSelected, err
	}
	p.target, err = r.target(ctx, p.old)
	switch {
	case err != nil && r.DryRun:
		return Unknown, nil
	case err != nil:
		return "", err
	case r.asWanted(p.old, p.target):
		return Current, nil
	case r.DryRun:
		return WouldRenew, nil
	case p.was.links > 1 && !r.BreakHardLinks:
		return "", fail(ReasonHardLink, fmt.Errorf("it has %d names, and only this one would get the new message", p.was.links))
	}
	return r.renew(ctx, p)
}

// asWanted tells whether a message is already what it is to become.
func (r *run) asWanted(old heading, target Label) bool {
	return !r.All && old.label == target && sameContext(old.context, r.contextOf(old.context))
}

// doneBefore tells whether the state file knows that this very file was made by
// a run with the same purpose.
func (r *run) doneBefore(j job) bool {
	if r.State == nil {
		return false
	}
	record, ok := r.State.Done(j.path())
	if !ok || record.Size != j.was.size || record.Mtime != j.was.mtime.Nano() || record.Inode != j.was.ino {
		return false
	}
	label := NewLabel(record.Key, record.Wrapping...)
	target, known := r.targets.get(label.Key)
	if !r.All && (!known || target != label) {
		return false
	}
	r.tally.saw(label, j.was.size)
	return true
}

// open opens the file that was found, if it still is that.
func (j job) open() (*os.File, snapshot, error) {
	source, err := j.in.open(j.name)
	if errors.Is(err, unix.ELOOP) {
		return nil, snapshot{}, fail(ReasonChanged, errChanged)
	}
	if err != nil {
		return nil, snapshot{}, fail(ReasonUnreadable, err)
	}
	was, err := snapshotFile(source)
	if err == nil && (was.kind() != unix.S_IFREG || !was.sameFile(j.was)) {
		err = fail(ReasonChanged, errChanged)
	}
	if err != nil {
		_ = source.Close()
		return nil, snapshot{}, err
	}
	return source, was, nil
}

// piece is one message on its way to a new one.
type piece struct {
	job
	source *os.File
	old    heading
	target Label
}

// renew makes the new message in a draft, checks it and puts it in place.
func (r *run) renew(ctx context.Context, p *piece) (Outcome, error) {
	// Where nothing can be written, the agent is not asked for anything.
	d, err := p.in.draft()
	if err != nil {
		return "", err
	}
	defer d.discard()
	if err := r.make(ctx, p, d); err != nil {
		return "", err
	}
	made, err := r.check(p, d)
	if err != nil {
		return "", err
	}
	if r.asWanted(p.old, made.label) {
		return Current, nil // the agent is behind what it said; a later run comes back to it
	}
	if r.Verify {
		if err := r.verify(ctx, p, d); err != nil {
			return "", err
		}
	}
	if err := d.dress(p.was, p.source, r.KeepTimes); err != nil {
		return "", err
	}
	is, err := d.replace(p.name, p.was, p.source)
	if err != nil {
		return "", err
	}
	r.done(p, made, is)
	return Renewed, nil
}

func (r *run) done(p *piece, made heading, is snapshot) {
	r.targets.set(p.old.label.Key, made.label)
	r.remember(Record{
		Path: p.path(), Outcome: Renewed, Key: made.label.Key, Wrapping: made.label.Wrappings(),
		From: hex.EncodeToString(p.old.id[:]), To: hex.EncodeToString(made.id[:]),
		Size: is.size, Mtime: is.mtime.Nano(), Inode: is.ino,
	})
	if r.Renewed != nil {
		r.Renewed(p.path(), p.old.label, made.label)
	}
}

// check reads the header of the new message as it stands in the draft.
func (r *run) check(p *piece, d *draft) (heading, error) {
	if _, err := d.file.Seek(0, 0); err != nil {
		return heading{}, err
	}
	made, err := readHeading(d.file)
	switch {
	case err != nil:
	case made.id == p.old.id:
		err = errors.New("it has the old one's message ID")
	case made.label.Key != p.target.Key:
		err = fmt.Errorf("it is under the key %q, not %q", made.label.Key, p.target.Key)
	case !sameContext(made.context, r.contextOf(p.old.context)):
		err = errors.New("it has another context")
	}
	if err != nil {
		return heading{}, fail(ReasonMismatch, fmt.Errorf("the new message is not used: %w", err))
	}
	return made, nil
}
