package hsm_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// fill has a rig open so many sessions, which are idle then.
func (r *rig) fill(fault *hsmtest.Fault, v *hsm.Version, wrapped []byte, sessions int) {
	r.t.Helper()
	fault.Set("C_Decrypt sleep_ms=100")
	var callers sync.WaitGroup
	for range sessions {
		callers.Go(func() {
			if err := r.unwraps(v, wrapped); err != nil {
				r.t.Error(err)
			}
		})
	}
	callers.Wait()
	fault.Set()
}

// All sessions, which are idle, and the login are lost at once: the next call goes on, whatever
// it is, and no key is taken for ill.
func TestAllIdleSessionsLost(t *testing.T) {
	uses := map[string]func(r *rig, v *hsm.Version, wrapped []byte) error{
		"unwrap": func(r *rig, v *hsm.Version, wrapped []byte) error { return r.unwraps(v, wrapped) },
		"wrap":   func(r *rig, v *hsm.Version, _ []byte) error { return r.wraps(v) },
		"random": func(r *rig, _ *hsm.Version, _ []byte) error { return r.Random(bounded(r.t), make([]byte, 32)) },
		"keys":   func(r *rig, _ *hsm.Version, _ []byte) error { _, err := r.Keys(bounded(r.t)); return err },
		"check":  func(r *rig, _ *hsm.Version, _ []byte) error { return r.Check(bounded(r.t)) },
	}
	for _, sessions := range []int{1, 2, 8} {
		t.Run(fmt.Sprint(sessions), func(t *testing.T) {
			r, fault := newFaultyRig(t, staying, func(_ *rig, c *hsm.Config) { c.Sessions = sessions })
			v, other := r.key("orders", hsm.GCM), r.key("other", hsm.GCM)
			m := material(32)
			wrapped := r.wrap(v, m)
			r.wrap(other, m)
			for name, use := range uses {
				r.fill(fault, v, wrapped, sessions)
				r.closeSessions()
				if err := use(r, v, wrapped); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			r.keepsConnection()
		})
	}
}

// Many callers lose sessions and login again and again: none of them notices.
func TestManyCallersLoseTheirSessions(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	a, b := r.key("a", hsm.GCM), r.key("b", hsm.CBCHMAC)
	m := material(32)
	wrappedA, wrappedB := r.wrap(a, m), r.wrap(b, m)
	for range 5 {
		r.fill(fault, a, wrappedA, 8)
		r.closeSessions() // not amid calls, which SoftHSM does not bear
		var callers sync.WaitGroup
		for range 4 {
			for _, use := range []func() error{
				func() error { return r.unwraps(a, wrappedA) }, func() error { return r.unwraps(b, wrappedB) },
				func() error { return r.wraps(a) }, func() error { return r.wraps(b) },
			} {
				callers.Go(func() {
					for range 20 {
						if err := use(); err != nil {
							t.Error(err)
						}
					}
				})
			}
		}
		callers.Wait()
	}
	r.keepsConnection()
}

// What is told of a session, a handle or the login says nothing of the data, also where it
// comes twice, or beside something else.
func TestLossesSayNothingOfTheData(t *testing.T) {
	r, fault := newFaultyRig(t)
	v, other := r.key("orders", hsm.GCM), r.key("other", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	r.wrap(other, m)
	for _, function := range []string{"C_DecryptInit", "C_Decrypt"} {
		for _, first := range []string{"0x101", "0xb3", "0x82", "0x5", "0x30"} {
			for _, second := range []string{"0x30", "0x5", "0x101", "0xb3"} {
				// The canary is opened in between, or with the first.
				for _, skip := range []string{"", " skip=1"} {
					fault.Set(function+" rv="+first+" count=1", function+skip+" rv="+second+" count=1")
					if err := r.unwraps(v, wrapped); err != nil {
						t.Errorf("%s: %s, then %s%s: %v", function, first, second, skip, err)
					}
				}
			}
		}
	}
	fault.Set()
	r.keepsConnection()
}

// Where the login is lost, and another caller logs in again just then, keys and records are
// no less there: who found none has searched before.
func TestNothingIsMissingWhileAnotherLogsIn(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	a, b := r.key("a", hsm.GCM), r.key("b", hsm.GCM)
	m := material(32)
	wrappedA, wrappedB := r.wrap(a, m), r.wrap(b, m)
	for name, use := range map[string]func() error{
		"a key":    func() error { return r.unwraps(a, wrappedA) },
		"a record": func() error { _, err := r.Key(bounded(t), "a"); return err },
		"all":      func() error { k, err := r.Keys(bounded(t)); return errorUnless(len(k) == 2, err, "%d keys", len(k)) },
		"strays":   func() error { s, err := r.Strays(bounded(t)); return errorUnless(len(s) == 0, err, "%+v", s) },
	} {
		r.fill(fault, a, wrappedA, 4)
		r.logOut()
		fault.Set("C_GetSessionInfo sleep_ms=200 count=1")
		var callers sync.WaitGroup
		callers.Go(func() {
			if err := use(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		underWay(t, fault, "C_GetSessionInfo") // one has found nothing
		callers.Go(func() {
			if err := r.unwraps(b, wrappedB); err != nil {
				t.Errorf("beside %s: %v", name, err)
			}
		})
		callers.Wait()
		fault.Set()
	}
}

// Where a module gives handles anew after a login, as it may, those of before are of use to
// nobody: nothing is wrapped under another key, and nothing that is well is taken for damaged.
func TestHandlesThatAreReused(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	a, b := r.key("a", hsm.GCM), r.key("b", hsm.GCM)
	m := material(32)
	wrappedA, wrappedB := r.wrap(a, m), r.wrap(b, m)
	for _, c := range []struct {
		name, slow string
		lostBefore bool // else a is bound to nothing, and its canary is what is slow
		use        func() error
	}{
		{"unwrap", "C_DecryptInit", true, func() error { return r.unwraps(a, wrappedA) }},
		{"wrap", "C_EncryptInit", true, func() error {
			w, err := r.Wrap(bounded(t), a, nil, m, bound)
			if err == nil {
				err = r.unwraps(a, w)
			}
			return err
		}},
		{"canary", "C_DecryptInit", false, func() error { return r.unwraps(a, wrappedA) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.opens(a, wrappedA, m)
			r.fill(fault, a, wrappedA, 2)
			if c.lostBefore {
				r.opens(b, wrappedB, m)
				r.closeSessions()
			} else {
				r.logOut()
				r.opens(b, wrappedB, m)
			}
			fault.Set(c.slow+" sleep_ms=200 count=1", "reused kmsagent/b/v1")
			fault.Calls()
			var callers sync.WaitGroup
			callers.Go(func() {
				if err := c.use(); err != nil {
					t.Error(err)
				}
			})
			underWay(t, fault, c.slow)
			if !c.lostBefore {
				r.closeSessions()
			}
			if err := r.unwraps(b, wrappedB); err != nil { // it logs in again
				t.Errorf("beside it: %v", err)
			}
			callers.Wait()
			fault.Set()
		})
	}
}

// A key that says its session is lost, not quite at once, is found out also where others are
// served; and no caller's time is exceeded by trying one session after the other.
func TestIllKeyThatLosesSessions(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	r.fill(fault, good, wrappedGood, 8)
	fault.Set("ill /bad/", "ill-code 0xb3", "ill-sleep 100", "C_Decrypt sleep_ms=2")
	callers := newCrowd(2500 * time.Millisecond)
	var told atomic.Int64
	callers.add(12, time.Millisecond, func() {
		if hsm.OfVersion(r.unwraps(bad, wrappedBad)) {
			told.Add(1)
		}
	})
	callers.add(4, 0, func() {
		if err := r.unwraps(good, wrappedGood); err != nil {
			t.Errorf("the key beside it: %v", err)
		}
	})
	callers.wg.Wait()
	if told.Load() < 100 {
		t.Errorf("it was told %d times that it is this key alone", told.Load())
	}
	r.keepsConnection()
	fault.Set()

	r.isWell(bad, wrappedBad, m)
	r.fill(fault, bad, wrappedBad, 8)
	fault.Set("C_DecryptInit sleep_ms=220 rv=0xb3")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	fault.Calls()
	_, _ = r.Unwrap(ctx, bad, nil, wrappedBad, bound)
	if n := fault.Calls()["C_DecryptInit"]; n > 3 {
		t.Errorf("%d calls of 220 ms for a caller with 300", n)
	}
}

// A pair that was disabled a moment ago, by another host, is told as that: that its public
// key does not encrypt any more is no outage.
func TestPairIsDisabledMeanwhile(t *testing.T) {
	r := newRig(t)
	v := r.key("orders", hsm.OAEPSHA1)
	r.wrap(v, material(32))
	if _, err := r.SetState(bounded(t), "orders", 1, hsm.Disabled); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := r.Wrap(bounded(t), v, nil, material(32), bound); hsm.KindOf(err) != hsm.KeyUnusable {
			t.Errorf("Wrap: %v, want that it is disabled", err)
		}
	}
}

// A key that was replaced by another is told as that, also where the first word about it was
// that nobody is logged in.
func TestImpostorAfterAWrongWord(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	v := r.key("orders", hsm.CBCHMAC)
	wrapped := r.wrap(v, material(32))
	r.substitute(v)
	for name, use := range map[string]func() error{"wrap": func() error { return r.wraps(v) }, "unwrap": func() error { return r.unwraps(v, wrapped) }} {
		r.logOut()
		fault.Set("C_DecryptInit rv=0x101 count=1")
		if err := use(); hsm.KindOf(err) != hsm.KeyUnusable {
			t.Errorf("%s: %v, want that it is another key", name, err)
		}
		fault.Set()
	}
}

// A test of a key in whose midst somebody logs in again says nothing of the key, then or later.
func TestTrialAmidALogin(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	v := r.key("orders", hsm.GCM)
	wrapped := r.wrap(v, material(32))
	r.substitute(v)
	r.logOut()
	fault.Set("C_EncryptInit sleep_ms=400 count=1")
	fault.Calls()
	var callers sync.WaitGroup
	callers.Go(func() { _ = r.unwraps(v, wrapped) })
	underWay(t, fault, "C_EncryptInit")
	r.logOut()
	if _, err := r.Keys(bounded(t)); err != nil {
		t.Error(err)
	}
	callers.Wait()
	fault.Set()
	if err := r.unwraps(v, wrapped); hsm.KindOf(err) != hsm.KeyUnusable {
		t.Errorf("unwrap: %v, want that it is another key", err)
	}
	r.keepsConnection()
}

// making has a key made, of the suite that it should be, and returns when its encryption number
// skip is under way, which takes ms milliseconds; made waits for the end.
func (r *rig) making(fault *hsmtest.Fault, name string, skip, ms int) (made func()) {
	r.t.Helper()
	fault.Set(fmt.Sprintf("C_EncryptInit skip=%d count=1 sleep_ms=%d", skip, ms))
	fault.Calls()
	begun := 0
	var beside sync.WaitGroup
	beside.Go(func() {
		k, err := r.CreateKey(bounded(r.t), name, 0)
		if err != nil {
			r.t.Errorf("CreateKey: %v", err)
		} else if got := k.Versions[0].Suite; got != hsm.GCM {
			r.t.Errorf("it makes a key of %v, want %v", got, hsm.GCM)
		}
	})
	eventually(r.t, "it is made", func() error {
		begun += fault.Calls()["C_EncryptInit"]
		return errorUnless(begun > skip, nil, "%d encryptions have begun", begun)
	})
	return beside.Wait
}

// A login that is lost while a key is made is no reason to make one of another suite, or none.
func TestLoginLostWhileAKeyIsMade(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	other := r.key("other", hsm.CBCHMAC)
	wrapped := r.wrap(other, material(32))
	for skip := 5; skip < 8; skip++ { // after the trial: its canary, and the test
		r.fill(fault, other, wrapped, 3)
		made := r.making(fault, fmt.Sprint("new", skip), skip, 200)
		r.logOut()
		if err := r.unwraps(other, wrapped); err != nil {
			t.Errorf("beside it: %v", err)
		}
		made()
		fault.Set()
	}
}

// So it is where the connection is lost: another one is made, and the key is of the suite that
// it should be.
func TestConnectionLostWhileAKeyIsMade(t *testing.T) {
	for skip := 5; skip < 8; skip++ { // after the trial: its canary, and the test
		t.Run(fmt.Sprint(skip), func(t *testing.T) {
			r, fault := newFaultyRig(t)
			made := r.making(fault, "new", skip, 400)
			fault.Set("dead")
			underWay(t, fault, "C_Encrypt") // the connection is lost
			fault.Set()                     // it is, until the module is initialised again
			made()
		})
	}
}

// Many sessions that were lost together, and slow answers, cost a caller little: those that
// were idle are not tried one after the other.
func TestManyIdleSessionsLost(t *testing.T) {
	for _, c := range []struct{ sessions, ms int }{{8, 130}, {64, 10}} {
		t.Run(fmt.Sprint(c.sessions, " ", c.ms), func(t *testing.T) {
			r, fault := newFaultyRig(t, staying, func(_ *rig, cfg *hsm.Config) { cfg.Sessions = c.sessions })
			v := r.key("orders", hsm.GCM)
			m := material(32)
			wrapped := r.wrap(v, m)
			r.fill(fault, v, wrapped, c.sessions)
			r.closeSessions()
			fault.Set(fmt.Sprintf("C_DecryptInit sleep_ms=%d", c.ms), fmt.Sprintf("C_FindObjectsInit sleep_ms=%d", c.ms))
			fault.Calls()
			r.opens(v, wrapped, m)
			if n := fault.Calls()["C_DecryptInit"]; n > 6 {
				t.Errorf("it took %d calls of C_DecryptInit, want 6 at most", n)
			}
			r.keepsConnection()
		})
	}
}

// One session that is lost costs the others nothing, however long it takes to close one.
func TestOneSessionLostAndSlowToClose(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	v, other := r.key("orders", hsm.GCM), r.key("other", hsm.GCM)
	m := material(32)
	wrapped, wrappedOther := r.wrap(v, m), r.wrap(other, m)
	r.opens(other, wrappedOther, m)
	r.fill(fault, v, wrapped, 8)
	fault.Set("C_DecryptInit rv=0xb3 count=1", "C_CloseSession sleep_ms=2500")
	fault.Calls()
	r.opens(v, wrapped, m)
	r.opens(other, wrappedOther, m)
	if n := fault.Calls()["C_CloseSession"]; n > 1 {
		t.Errorf("%d sessions were closed, want the one", n)
	}
}

// A connection whose logins are of no use any more is made anew.
func TestLoginsOfNoUse(t *testing.T) {
	for _, rule := range []string{"C_FindObjectsInit rv=0x101", "C_GetAttributeValue rv=0x101", "C_Login rv=0"} {
		t.Run(rule, func(t *testing.T) {
			r, fault := newFaultyRig(t, staying)
			v, other := r.key("orders", hsm.GCM), r.key("other", hsm.GCM)
			wrapped := r.wrap(v, material(32))
			r.wrap(other, material(32))
			r.logOut()
			fault.Set(rule)
			fault.Calls()
			eventually(t, "there is another connection", func() error {
				err := r.unwraps(v, wrapped)
				return errorUnless(fault.Calls()["C_Initialize"] > 0, nil, "there is none; %v", err)
			})
			fault.Set()
			eventually(t, "it works again", func() error { return r.unwraps(v, wrapped) })
		})
	}
}

// A mishap while a key is made is no reason to make one of another suite.
func TestMishapWhileAKeyIsMade(t *testing.T) {
	for _, rule := range []string{
		"C_EncryptInit rv=0x101", "C_EncryptInit rv=0x30", "C_EncryptInit rv=0x5", "C_EncryptInit rv=0x82", "C_EncryptInit rv=0xb3",
		"C_Encrypt rv=0x5", "C_DecryptInit rv=0x5", "C_Decrypt rv=0x5", "C_GenerateKey rv=0x6", "C_FindObjectsInit rv=0x5", "C_GetAttributeValue rv=0x5",
	} {
		t.Run(rule, func(t *testing.T) {
			function, _, _ := strings.Cut(rule, " ")
			made := 0
			for before, reached := 0, true; reached; before++ { // in the trial, the making, with the canary, in the test
				reached = t.Run(fmt.Sprint(before), func(t *testing.T) {
					r, fault := newFaultyRig(t)
					rule := rule + " count=1"
					if before > 0 {
						rule += fmt.Sprintf(" skip=%d", before)
					}
					fault.Set(rule)
					fault.Calls()
					k, err := r.CreateKey(bounded(t), "new", 0)
					calls := fault.Calls()
					if reached = calls[function] > before; !reached {
						return
					}
					switch {
					case err == nil && k.Versions[0].Suite != hsm.GCM:
						t.Errorf("it makes a key of %v, want %v", k.Versions[0].Suite, hsm.GCM)
					case err == nil:
						made++
					case calls["C_GenerateKey"] > 0 && calls["C_EncryptInit"] < 8: // else it is of a record, before or after
						t.Error(err)
					}
					fault.Set()
					if strays, err := r.Strays(bounded(t)); err != nil || len(strays) > 0 {
						t.Errorf("strays: %+v, %v; want none", strays, err)
					}
				}) && reached
			}
			if made < 2 {
				t.Errorf("%d keys were made in spite of it", made)
			}
		})
	}
}

// So it is where somebody else finds the connection lost.
func TestOthersLoseTheConnectionWhileAKeyIsMade(t *testing.T) {
	r, fault := newFaultyRig(t)
	v := r.key("other", hsm.GCM)
	wrapped := r.wrap(v, material(32))
	made := r.making(fault, "new", 5, 400)
	fault.Set("C_DecryptInit rv=0x30")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, _ = r.Unwrap(ctx, v, nil, wrapped, bound)
	fault.Set()
	made()
	if r.attached() < 2 {
		t.Error("the connection was not lost")
	}
}

// A new key that does not work is told as that, and not as an outage, where others work.
func TestNewKeyThatIsIll(t *testing.T) {
	r, fault := newFaultyRig(t)
	other := r.key("other", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(other, m)
	fault.Set("ill /new/", "ill-code 0x30")
	if _, err := r.CreateKey(bounded(t), "new", hsm.GCM); hsm.KindOf(err) != hsm.Broken {
		t.Errorf("CreateKey: %v, want that the token cannot do this", err)
	}
	r.opens(other, wrapped, m)
}

// Damaged data is told as that, however much was lost before.
func TestDamagedDataAfterLosses(t *testing.T) {
	for name, lose := range map[string]func(r *rig){"sessions": (*rig).closeSessions, "login": (*rig).logOut} {
		for _, idle := range []int{1, 4} {
			t.Run(fmt.Sprint(name, " ", idle), func(t *testing.T) {
				r, fault := newFaultyRig(t, staying)
				v, other := r.key("orders", hsm.GCM), r.key("other", hsm.GCM)
				wrapped := r.wrap(v, material(32))
				r.wrap(other, material(32))
				r.fill(fault, v, wrapped, idle)
				wrapped[len(wrapped)-1] ^= 1
				lose(r)
				var callers sync.WaitGroup
				for range 8 {
					callers.Go(func() {
						if err := r.unwraps(v, wrapped); hsm.KindOf(err) != hsm.BadCiphertext {
							t.Errorf("damaged data: %v", err)
						}
					})
				}
				callers.Wait()
			})
		}
	}
}

// Data that a token says now this and now that of, while canaries open, is neither told as
// damaged nor taken for an outage of the token.
func TestDataThatFailsInDifferentWays(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	r.opens(v, wrapped, m)
	var rules []string
	for i := range 6 {
		rules = append(rules, fmt.Sprintf("C_Decrypt skip=%d count=1 rv=%s", i, []string{"0x5", "0x6"}[i%2]))
	}
	rules[0] = "C_Decrypt count=1 rv=0x5"
	fault.Set(rules...)
	if err := r.unwraps(v, wrapped); !hsm.OfVersion(err) {
		t.Errorf("Unwrap: %v, want an outage of this version", err)
	}
	fault.Set()
	r.opens(v, wrapped, m)
	r.keepsConnection()
}

// Good data that fails twice within a moment is not told as damaged, though its caller has
// waited before: for a login, a session, or the machine.
func TestMishapsAfterAWait(t *testing.T) {
	m := material(32)
	twoKeys := func(t *testing.T, configure ...func(*rig, *hsm.Config)) (*rig, *hsmtest.Fault, *hsm.Version, []byte) {
		r, fault := newFaultyRig(t, append(configure, staying)...)
		v, other := r.key("orders", hsm.GCM), r.key("other", hsm.GCM)
		wrapped := r.wrap(v, m)
		r.wrap(other, m)
		return r, fault, v, wrapped
	}
	t.Run("login", func(t *testing.T) {
		r, fault, v, wrapped := twoKeys(t)
		r.logOut()
		fault.Set("C_Login sleep_ms=300", "C_Decrypt skip=1 rv=0x5 count=1", "C_Decrypt skip=2 rv=0x5 count=1")
		r.opens(v, wrapped, m)
	})
	mishap := "C_Decrypt rv=0x5 count=1"
	t.Run("slow once", func(t *testing.T) {
		r, fault, v, wrapped := twoKeys(t)
		r.opens(v, wrapped, m)
		fault.Set(mishap, mishap+" skip=1 sleep_ms=800")
		if err := r.unwraps(v, wrapped); err != nil {
			t.Error(err)
		}
	})
	t.Run("session", func(t *testing.T) {
		r, fault, v, wrapped := twoKeys(t, func(_ *rig, c *hsm.Config) { c.Sessions = 1 })
		fault.Set("C_Decrypt count=1 sleep_ms=400", "C_Decrypt rv=0x5 count=1", "C_Decrypt skip=1 rv=0x5 count=1")
		fault.Calls()
		var beside sync.WaitGroup
		beside.Go(func() { r.opens(v, wrapped, m) })
		underWay(t, fault, "C_Decrypt")
		r.opens(v, wrapped, m)
		beside.Wait()
	})
	t.Run("machine", func(t *testing.T) {
		r, fault, v, wrapped := twoKeys(t)
		fault.Set("C_DecryptInit rv=0x5 count=1 sleep_ms=260", "C_DecryptInit skip=1 rv=0x5 count=1")
		r.opens(v, wrapped, m)
	})
}

// A key that is not found, since the token fails whenever it is looked for, is an outage of this
// key alone where another is served, whatever the token says.
func TestKeyThatIsNotFoundWithAnyCode(t *testing.T) {
	for _, code := range []string{"0x5", "0x30", "0x82", "0xb3", "0x101"} {
		for _, function := range []string{"C_GetAttributeValue", "C_FindObjectsInit"} {
			t.Run(function+" "+code, func(t *testing.T) {
				r, fault := newFaultyRig(t, staying)
				bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
				m := material(32)
				wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
				r.logOut()
				r.opens(good, wrappedGood, m) // it need not be looked for
				fault.Set(function + " rv=" + code)
				for range 3 {
					if err := r.unwraps(bad, wrappedBad); !hsm.OfVersion(err) {
						t.Errorf("%v, want an outage of this version", err)
					}
					r.opens(good, wrappedGood, m)
				}
				r.keepsConnection()
			})
		}
	}
}

// A login that is lost twice during one call, and takes long to make again, is waited for.
func TestLoginLostTwice(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	r.fill(fault, v, wrapped, 4)
	fault.Set("C_Login sleep_ms=400", "C_DecryptInit sleep_ms=150 rv=0x101 count=2", "C_DecryptInit sleep_ms=150")
	fault.Calls()
	var callers sync.WaitGroup
	callers.Go(func() { r.opens(v, wrapped, m) })
	for range 2 {
		underWay(t, fault, "C_DecryptInit")
		r.logOut()
		if _, err := r.Keys(bounded(t)); err != nil { // who logs in again
			t.Error(err)
		}
	}
	callers.Wait()
}

// Of a CBC ciphertext, whose MAC was right, another key makes what may look well: somebody who
// logs in again between the two makes what comes of it void.
func TestReusedHandleAfterTheMAC(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	a := r.key("a", hsm.CBCHMAC)
	m := material(32)
	others := map[pkcs11.ObjectHandle]*hsm.Version{}
	library, slot := r.application()
	session, err := library.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		v := r.key(fmt.Sprint("b", i), hsm.CBCHMAC)
		if err := library.FindObjectsInit(session, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, v.ID[:]), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)}); err != nil {
			t.Fatal(err)
		}
		found, _, err := library.FindObjects(session, 2)
		if err = errors.Join(err, library.FindObjectsFinal(session)); err != nil || len(found) != 1 {
			t.Fatal(found, err)
		}
		others[found[0]] = v
	}
	// looksWell gives the key under which the plaintext of a ciphertext begins with a length that is possible.
	looksWell := func(wrapped []byte) *hsm.Version {
		tail := wrapped[len(wrapped)-96:] // vector, ciphertext, MAC
		for key, v := range others {
			err := library.DecryptInit(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_CBC, tail[:16])}, key)
			if err != nil {
				t.Fatal(err)
			}
			if p, err := library.Decrypt(session, tail[16:64]); err != nil {
				t.Fatal(err)
			} else if binary.BigEndian.Uint16(p) == 46 {
				return v
			}
		}
		return nil
	}
	var wrapped []byte
	var other *hsm.Version
	for range 40000 { // of which one in 1600 is enough
		wrapped = r.wrap(a, m)
		if other = looksWell(wrapped); other != nil {
			break
		}
	}
	if other == nil {
		t.Fatal("no ciphertext looks well under another key")
	}
	if err := library.CloseSession(session); err != nil {
		t.Fatal(err)
	}
	wrappedOther := r.wrap(other, m)
	r.fill(fault, a, wrapped, 2)
	r.opens(other, wrappedOther, m)
	r.opens(a, wrapped, m)
	fault.Set("C_DecryptInit sleep_ms=300 count=1", fmt.Sprintf("reused kmsagent/%s/v1", other.Key))
	fault.Calls()
	var callers sync.WaitGroup
	callers.Go(func() { r.opens(a, wrapped, m) })
	underWay(t, fault, "C_DecryptInit")
	r.logOut()
	if err := r.unwraps(other, wrappedOther); err != nil {
		t.Errorf("beside it: %v", err)
	}
	callers.Wait()
}

func errorUnless(fine bool, err error, format string, a ...any) error {
	if err == nil && !fine {
		return fmt.Errorf(format, a...)
	}
	return err
}

// A key whose record was lost is found without a login too, and where it is lost on the way.
func TestStraysWithoutALogin(t *testing.T) {
	r, fault := newFaultyRig(t)
	r.key("orders", hsm.GCM)
	r.key("other", hsm.GCM)
	r.tool("--delete-object", "--type", "data", "--label", "kmsagent/orders")
	r.logOut()
	if strays, err := r.Strays(bounded(t)); err != nil || len(strays) != 1 {
		t.Errorf("strays: %+v, %v; want the one of orders", strays, err)
	}
	for skip := 1; skip < 5; skip++ { // it takes five searches
		fault.Set(fmt.Sprintf("C_FindObjectsInit skip=%d count=1 sleep_ms=300", skip))
		fault.Calls()
		begun := 0
		var beside sync.WaitGroup
		beside.Go(func() {
			eventually(t, "it searches", func() error {
				begun += fault.Calls()["C_FindObjectsInit"]
				return errorUnless(begun > skip, nil, "%d searches have begun, want more than %d", begun, skip)
			})
			r.logOut()
		})
		r.makesNone("orders")
		beside.Wait()
	}
}

// With one session a key that slowly says nobody is logged in, where somebody is, does not
// keep that session for itself: others are served, and its callers are told.
func TestOneSessionAndAKeyThatWantsALogin(t *testing.T) {
	r, fault := newFaultyRig(t, staying, func(_ *rig, c *hsm.Config) { c.Sessions = 1 })
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	r.opens(good, wrappedGood, m)
	fault.Set("ill /bad/", "ill-sleep 400", "ill-code 0x101")
	callers := newCrowd(5 * time.Second)
	var told atomic.Int64
	var served, late int
	callers.add(12, time.Millisecond, func() {
		if hsm.OfVersion(r.unwraps(bad, wrappedBad)) {
			told.Add(1)
		}
	})
	callers.add(1, 5*time.Millisecond, func() {
		if err := r.unwraps(good, wrappedGood); err != nil {
			late++
		} else {
			served++
		}
	})
	callers.wg.Wait()
	if told.Load() < 100 || served < 20 || late > 2 {
		t.Errorf("%d calls of the key were told that it is ill; of the other %d were served and %d not", told.Load(), served, late)
	}
}
