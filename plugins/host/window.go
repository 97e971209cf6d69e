package host

import "time"

// tally counts calls.
type tally struct{ calls, failures int }

func (t tally) rate() float64 { return float64(t.failures) / float64(max(t.calls, 1)) }

const (
	windowSlots = 10
	windowSlot  = time.Second
)

// window counts the calls of the last ten seconds.
type window struct {
	start time.Time
	slots [windowSlots]tally
	at    int64 // the slot of the last call, counted from start
	sum   tally
}

func (w *window) add(now time.Time, failure bool) {
	w.advance(now)
	slot := &w.slots[w.at%windowSlots]
	slot.calls++
	w.sum.calls++
	if failure {
		slot.failures++
		w.sum.failures++
	}
}

// advance forgets what is too old.
func (w *window) advance(now time.Time) {
	at := int64(now.Sub(w.start) / windowSlot)
	for range min(at-w.at, windowSlots) {
		w.at++
		slot := &w.slots[w.at%windowSlots]
		w.sum.calls, w.sum.failures = w.sum.calls-slot.calls, w.sum.failures-slot.failures
		*slot = tally{}
	}
	w.at = max(w.at, at)
}
