package audit

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"
)

const (
	checkpointPrefix = `{"checkpoint":"`
	proofPrefix      = `,"proof":"`
	// maxCheckpoint bounds a checkpoint, in bytes.
	maxCheckpoint = 512
	// maxCheckpoints bounds how many are read for one verification.
	maxCheckpoints = 1 << 20
)

// Checkpoint says that a chain has reached a record. Only who had the chain's
// key then could write it, and that key is gone since.
type Checkpoint struct {
	Chain    string
	Sequence uint64
	MAC      [sha256.Size]byte // of that record
	Time     time.Time

	text  []byte
	proof [sha256.Size]byte
}

// appendCheckpoint appends the checkpoint of a chain whose last record is the
// one before c.next, without a newline.
func (c *chain) appendCheckpoint(b []byte, id string, now time.Time) []byte {
	start := len(b)
	b = append(append(b, checkpointPrefix...), id...)
	b = append(b, `","sequence":`...)
	b = strconv.AppendUint(b, c.next-1, 10)
	b = append(b, `,"time":"`...)
	b = now.UTC().AppendFormat(b, time.RFC3339)
	b = append(b, `"`+macPrefix...)
	b = append(hex.AppendEncode(b, c.previous[:]), '"')
	proof := c.proof(b[start:])
	b = append(b, proofPrefix...)
	return append(hex.AppendEncode(b, proof[:]), lineSuffix...)
}

// proof authenticates the text of a checkpoint behind the chain's last record.
func (c *chain) proof(text []byte) (proof [sha256.Size]byte) {
	h := hmac.New(sha256.New, c.key[:])
	h.Write(text)
	h.Sum(proof[:0])
	return proof
}

// ParseCheckpoints reads the checkpoints that stand in r, one a line at most.
// What stands before and behind one in its line, such as a syslog daemon's own
// words, is skipped, and so are lines without any. Nothing is verified yet.
func ParseCheckpoints(r io.Reader) ([]Checkpoint, error) {
	var all []Checkpoint
	lines := newLineReader(r)
	for {
		line, _, _, err := lines.next()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		c, ok := parseCheckpoint(line)
		if !ok {
			continue
		}
		if len(all) == maxCheckpoints {
			return nil, fmt.Errorf("there are more than %d checkpoints; give the newest only", maxCheckpoints)
		}
		all = append(all, c)
	}
}

// parseCheckpoint finds a checkpoint in a line.
func parseCheckpoint(line []byte) (c Checkpoint, ok bool) {
	begin := bytes.Index(line, []byte(checkpointPrefix))
	if begin < 0 {
		return c, false
	}
	line = line[begin:]
	line = line[:min(len(line), maxCheckpoint)]
	text, proof, found := bytes.Cut(line, []byte(proofPrefix))
	if !found || len(proof) < hexSize+len(lineSuffix) || !quotedHex(&c.proof, proof[:hexSize+len(lineSuffix)], "", lineSuffix) {
		return c, false
	}
	c.text = bytes.Clone(text)
	chain, rest, found := bytes.Cut(text[len(checkpointPrefix):], []byte(`","sequence":`))
	number, rest, found2 := bytes.Cut(rest, []byte(`,"time":"`))
	at, mac, found3 := bytes.Cut(rest, []byte(`"`+macPrefix))
	if !found || !found2 || !found3 || !quotedHex(&c.MAC, mac, "", `"`) {
		return c, false
	}
	var err, timeErr error
	c.Chain = string(chain)
	c.Sequence, err = strconv.ParseUint(string(number), 10, 64)
	c.Time, timeErr = time.Parse(time.RFC3339, string(at))
	return c, err == nil && timeErr == nil && c.Sequence > 0 && number[0] != '0'
}

// checkpoints are those of one chain, by sequence number.
type checkpoints []Checkpoint

func sortedCheckpoints(all []Checkpoint, chain string) (own checkpoints, foreign int) {
	for _, c := range all {
		if c.Chain == chain {
			own = append(own, c)
		}
	}
	slices.SortStableFunc(own, func(a, b Checkpoint) int {
		switch {
		case a.Sequence < b.Sequence:
			return -1
		case a.Sequence > b.Sequence:
			return 1
		}
		return 0
	})
	return own, len(all) - len(own)
}

// reached compares the checkpoints of a record that has just verified.
func (v *verifier) reached(s signedLine) {
	for len(v.checkpoints) > 0 && v.checkpoints[0].Sequence <= s.sequence {
		c := v.checkpoints[0]
		v.checkpoints = v.checkpoints[1:]
		switch {
		case c.Sequence < s.sequence: // of a record that is not given
		case !v.check.chain.vouches(c):
			v.report.CheckpointsIgnored++
		case c.MAC != s.mac:
			v.fault(v.place, ReasonForked, "record %d is genuine, but a checkpoint of it tells of another one: "+
				"two agents wrote from one state, or the log was rewritten", s.sequence)
		default:
			v.report.Checkpoints++
			v.report.Proven = s.sequence
		}
	}
}

func (c *chain) vouches(p Checkpoint) bool {
	proof := c.proof(p.text)
	return hmac.Equal(proof[:], p.proof[:])
}

// beyond looks at the checkpoints behind the end of the log.
func (v *verifier) beyond() {
	ahead := v.check.chain
	for _, c := range v.checkpoints {
		if c.Sequence-v.check.chain.next >= maxProbe {
			v.report.CheckpointsIgnored++
			continue
		}
		ahead.skip(c.Sequence + 1)
		if !ahead.vouches(c) {
			v.report.CheckpointsIgnored++
			continue
		}
		v.report.Checkpoints++
		v.report.Proven = c.Sequence
	}
	v.checkpoints = nil
}
