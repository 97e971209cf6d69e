package main

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// outages are what the network does to an HSM, seen by those who call the backend in
// its own process, confined.
type outages struct {
	*hsmtest.Remote

	t        *testing.T
	backend  *host.Supervisor
	material []byte
	wrapped  []byte
}

func newOutages(t *testing.T) *outages {
	t.Helper()
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders", Suite: "rsa-oaep-sha1"})
	o := &outages{Remote: hsmtest.NewRemote(t, r.SoftHSM), t: t, material: bytes.Repeat([]byte{7}, 32)}
	r.settings["module"], r.settings["hang_after"] = o.Module, "500ms"
	cfg := plugintest.Config(t, "pkcs11", r.json())
	cfg.Env = append(cfg.Env, o.Env()...)
	cfg.Access.Read, cfg.Access.Write = []string{r.Dir()}, []string{r.Tokens(), r.state()}
	cfg.BackoffMin, cfg.BackoffMax = 10*time.Millisecond, 100*time.Millisecond
	o.backend = plugintest.Start(t, cfg)
	eventually(t, func() (err error) {
		o.wrapped, err = o.backend.Wrap(bounded(t), orders, o.material, plugins.Binding{Purpose: "message"})
		return err
	})
	return o
}

func (o *outages) unwrap() error {
	got, err := o.backend.Unwrap(bounded(o.t), orders, o.wrapped, plugins.Binding{Purpose: "message"})
	if err == nil && !bytes.Equal(got, o.material) {
		return errors.New("it opens to something else")
	}
	return err
}

// lasts says that nothing but an outage is seen until d is over, that it makes no
// storm of connections, and when it began.
func (o *outages) lasts(d time.Duration) (gone time.Time) {
	o.t.Helper()
	gone = time.Now()
	_ = o.Connections()
	for time.Since(gone) < d {
		time.Sleep(10 * time.Millisecond)
		if err := o.unwrap(); plugins.ClassOf(err) != plugins.Unavailable {
			o.t.Errorf("Unwrap: %v, want Unavailable", err)
		}
	}
	if n := o.Connections(); n > 8 {
		o.t.Errorf("%d connections in %v", n, time.Since(gone))
	}
	return gone
}

// ends says that the backend serves again soon: pauses double, so they are not much
// longer than what was gone since then.
func (o *outages) ends(gone time.Time) {
	o.t.Helper()
	back := time.Now()
	eventually(o.t, o.unwrap)
	if d := time.Since(back); d > 2*back.Sub(gone)+time.Second {
		o.t.Errorf("the first answer %v after it is back", d)
	}
}

func TestRemote(t *testing.T) {
	o := newOutages(t)
	t.Run("outage", o.outage)
	t.Run("load", o.load)
	t.Run("black hole", o.blackHole)
}

// outage: the process outlives what its connection to the HSM does not.
func (o *outages) outage(t *testing.T) {
	before := o.backend.Status()
	o.Cut()
	if err := o.unwrap(); err != nil {
		t.Errorf("Unwrap: %v, want that a lost connection costs no call", err)
	}
	o.Stop()
	gone := o.lasts(time.Second)
	o.Start()
	o.ends(gone)
	if after := o.backend.Status(); after.PID != before.PID {
		t.Errorf("process %d was replaced by %d", before.PID, after.PID)
	}
}

// load: connections that are lost amid calls are an outage and no more, also where
// the module does not get over it: p11-kit's client hangs now and then.
func (o *outages) load(t *testing.T) {
	gone := time.Now()
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for time.Since(gone) < time.Second {
				if err := o.unwrap(); err != nil && plugins.ClassOf(err) != plugins.Unavailable {
					t.Errorf("Unwrap: %v, want Unavailable", err)
				}
			}
		})
	}
	for range 5 {
		time.Sleep(150 * time.Millisecond)
		o.Cut()
	}
	callers.Wait()
	o.ends(gone)
}

// blackHole: an HSM that takes everything and answers nothing costs the process that
// waits for it in the module; only the end of that helps. Others take its place.
func (o *outages) blackHole(t *testing.T) {
	before := o.backend.Status()
	o.Silence(true)
	gone := o.lasts(1500 * time.Millisecond)
	o.Silence(false)
	o.ends(gone)
	if after := o.backend.Status(); after.PID == before.PID {
		t.Errorf("process %d goes on", before.PID)
	}
}
