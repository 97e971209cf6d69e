package hsm_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// BenchmarkWrapUnwrap is a wrap and an unwrap of 32 bytes on SoftHSM, in so many
// sessions: c-ratio is against the same loop in C, of which 0.9 is the limit for one
// session; miekg-ratio is against a plain loop over github.com/miekg/pkcs11, which is
// to be beaten. Ours are callers with deadlines, who stay with the module as those of
// the plugin do; those who leave a module that blocks are measured too. A ratio
// is the median of those of rounds in which both were measured: machines drift.
func BenchmarkWrapUnwrap(b *testing.B) {
	loop := hsmtest.NewLoop(b, ".")
	for _, c := range []struct {
		name     string
		sessions int
		stay     bool
	}{{"sessions=1", 1, true}, {"sessions=8", 8, true}, {"sessions=16", 16, true}, {"sessions=1,leaving", 1, false}} {
		b.Run(c.name, func(b *testing.B) {
			r := newRig(b, func(_ *rig, cfg *hsm.Config) { cfg.Sessions, cfg.Stay = c.sessions, c.stay })
			v := r.key("orders", hsm.GCM)
			const round = time.Second
			var ours, toC, toMiekg []float64
			for b.Loop() {
				n := rate(b, c.sessions, round, r.pairs(v))
				ours = append(ours, n)
				toC = append(toC, n/loopRate(b, loop, c.sessions, v, round))
			}
			for range ours {
				n := rate(b, c.sessions, round, r.pairs(v))
				toMiekg = append(toMiekg, n/rate(b, c.sessions, round, miekgPairs(b, v)))
			}
			b.ReportMetric(median(ours), "pairs/s")
			b.ReportMetric(median(toC), "c-ratio")
			b.ReportMetric(median(toMiekg), "miekg-ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}

// rate runs workers, of what begin returns, for a time and counts what they did.
func rate(b *testing.B, workers int, length time.Duration, begin func() (pair func() error, end func())) float64 {
	b.Helper()
	var done atomic.Int64
	var stop atomic.Bool
	var wg sync.WaitGroup
	began := time.Now()
	for range workers {
		pair, end := begin()
		defer end()
		wg.Go(func() {
			for !stop.Load() {
				if err := pair(); err != nil {
					b.Error(err)
					return
				}
				done.Add(1)
			}
		})
	}
	time.Sleep(length)
	n, took := done.Load(), time.Since(began)
	stop.Store(true)
	wg.Wait()
	return float64(n) / took.Seconds()
}

func (r *rig) pairs(v *hsm.Version) func() (func() error, func()) {
	ctx := bounded(r.t)
	return func() (func() error, func()) {
		dek, wrapped, opened := material(32), make([]byte, 0, 200), make([]byte, 0, 200)
		return func() (err error) {
			if wrapped, err = r.Wrap(ctx, v, wrapped[:0], dek, bound); err == nil {
				opened, err = r.Unwrap(ctx, v, opened[:0], wrapped, bound)
			}
			return err
		}, func() {}
	}
}

func loopRate(b *testing.B, loop string, sessions int, v *hsm.Version, length time.Duration) float64 {
	b.Helper()
	out, err := exec.CommandContext(b.Context(), loop, softHSM, userPIN, fmt.Sprintf("%x", v.ID), strconv.Itoa(sessions), strconv.Itoa(int(length.Milliseconds()))).Output()
	if err != nil {
		b.Fatal(err)
	}
	n, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// miekgPairs is a plain loop over miekg/pkcs11 in the same process: the module is
// initialised and logged in already.
func miekgPairs(b *testing.B, v *hsm.Version) func() (func() error, func()) {
	b.Helper()
	ctx := pkcs11.New(softHSM)
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		b.Fatal(err)
	}
	return func() (func() error, func()) {
		session, err := ctx.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			b.Fatal(err)
		}
		if err := ctx.FindObjectsInit(session, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, v.ID[:]),
		}); err != nil {
			b.Fatal(err)
		}
		keys, _, err := ctx.FindObjects(session, 1)
		if err != nil || len(keys) != 1 {
			b.Fatal(keys, err)
		}
		if err := ctx.FindObjectsFinal(session); err != nil {
			b.Fatal(err)
		}
		dek, aad, iv := material(32), make([]byte, 64), make([]byte, 12)
		return func() error {
			_, _ = rand.Read(iv) // never fails
			p := pkcs11.NewGCMParams(iv, aad, 128)
			defer p.Free()
			if err := ctx.EncryptInit(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, keys[0]); err != nil {
				return err
			}
			wrapped, err := ctx.Encrypt(session, dek)
			if err != nil {
				return err
			}
			q := pkcs11.NewGCMParams(iv, aad, 128)
			defer q.Free()
			if err := ctx.DecryptInit(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, q)}, keys[0]); err != nil {
				return err
			}
			opened, err := ctx.Decrypt(session, wrapped)
			if err == nil && !bytes.Equal(opened, dek) {
				err = errors.New("it opens to something else")
			}
			return err
		}, func() { _ = ctx.CloseSession(session) }
	}
}

// BenchmarkAllocations is one pair: there are none.
func BenchmarkAllocations(b *testing.B) {
	r := newRig(b)
	pair, _ := r.pairs(r.key("orders", hsm.GCM))()
	b.ReportAllocs()
	for b.Loop() {
		if err := pair(); err != nil {
			b.Fatal(err)
		}
	}
}
