package kms

import (
	"sync"
	"time"

	"github.com/kms-agent/kms-agent/envelope"
)

// A frame gives nothing before all of it has been verified, so that a stream
// holds one in memory, of up to envelope.MaxFrameLength bytes. Those that are
// larger than a request is by default are counted.
const (
	ordinaryFrame      = 1 << 20
	maxFrames          = 4 * envelope.MaxFrameLength
	maxFramesPerCaller = maxFrames / 2
)

// largeFrames counts the memory that streams with large frames may need.
type largeFrames struct {
	mu       sync.Mutex // guards what follows
	total    uint64
	byCaller map[string]uint64
}

// reserve makes sure of the memory for the frames of a message. release gives it
// back, and is for one call.
func (l *largeFrames) reserve(caller string, h *envelope.Header) (release func(), err error) {
	need := uint64(h.FrameLength)
	if need == 0 {
		need = envelope.MaxNonFramedSize // how much it is stands in the body
	}
	if need <= ordinaryFrame {
		return func() {}, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total+need > maxFrames || l.byCaller[caller]+need > maxFramesPerCaller {
		return nil, &Error{
			Reason: ReasonTooManyRequests, RetryAfter: time.Second,
			Message: "too many streams at once hold messages with large frames; retry when others have ended",
		}
	}
	l.total += need
	l.byCaller[caller] += need
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.total -= need
		if l.byCaller[caller] -= need; l.byCaller[caller] == 0 {
			delete(l.byCaller, caller)
		}
	}, nil
}
