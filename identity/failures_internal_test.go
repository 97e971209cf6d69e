package identity

import (
	"testing"
	"time"
)

func TestTokenFailuresAreBoundedForEachUser(t *testing.T) {
	var f tokenFailures
	now := time.Now()
	for n := range failuresAtOnce {
		if !f.allow(1, now) {
			t.Fatalf("refused after %d failures", n)
		}
		f.note(1, now)
	}
	if f.allow(1, now) {
		t.Errorf("allowed after %d failures at once", failuresAtOnce)
	}
	if !f.allow(2, now) {
		t.Error("another user is refused")
	}
	f.note(1, now) // one that was verified at the same time
	now = now.Add(time.Second / failuresPerSecond)
	if f.allow(1, now) {
		t.Error("what was over the bound is not paid for")
	}
	if now = now.Add(time.Second / failuresPerSecond); !f.allow(1, now) {
		t.Error("still refused when there is room again")
	}
}

// However many users somebody has, they are counted together in the end, and make
// room for others once they stop.
func TestTokenFailuresOfManyUsers(t *testing.T) {
	var f tokenFailures
	now := time.Now()
	verified := 0
	for uid := range uint32(100 * maxFailingUsers) {
		for range 2 {
			if f.allow(uid, now) {
				f.note(uid, now)
				verified++
			}
		}
	}
	if most := 2*maxFailingUsers + failuresAtOnce; verified > most || len(f.byUID) > maxFailingUsers {
		t.Errorf("%d tokens of ever new users were verified, and %d users remembered; want %d and %d at most", verified, len(f.byUID), most, maxFailingUsers)
	}
	if !f.allow(1, now) {
		t.Error("a user with a count of its own is refused for others")
	}
	now = now.Add(time.Minute)
	f.note(1<<20, now)
	if len(f.byUID) != 1 {
		t.Errorf("%d users are remembered, want the one that failed last", len(f.byUID))
	}
}
