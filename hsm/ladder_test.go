package hsm_test

import (
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm"
)

// application is another part of this process that uses SoftHSM: to the library it is
// the same application, whose login and sessions are those of the rig.
func (r *rig) application() (library *pkcs11.Ctx, slot uint) {
	r.t.Helper()
	library = pkcs11.New(softHSM)
	r.t.Cleanup(library.Destroy)
	info, err := r.Info(bounded(r.t))
	if err != nil {
		r.t.Fatal(err)
	}
	return library, info.Slot
}

// logOut ends the login, of all sessions.
func (r *rig) logOut() {
	r.t.Helper()
	library, slot := r.application()
	session, err := library.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err == nil {
		err = library.Logout(session)
	}
	if err == nil {
		err = library.CloseSession(session)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// closeSessions ends all sessions, and the login with them.
func (r *rig) closeSessions() {
	r.t.Helper()
	library, slot := r.application()
	if err := library.CloseAllSessions(slot); err != nil {
		r.t.Fatal(err)
	}
}

// ladderUses are what is done with a key after something was lost: all of it works as if
// nothing had been.
func ladderUses(v *hsm.Version, m, wrapped []byte) map[string]func(r *rig) {
	return map[string]func(r *rig){
		"unwrap": func(r *rig) { r.opens(v, wrapped, m) },
		"wrap":   func(r *rig) { r.wrap(v, m) },
		"health": func(r *rig) {
			if err := r.Check(bounded(r.t)); err != nil {
				r.t.Errorf("Check: %v", err)
			}
		},
		"all keys": func(r *rig) {
			if keys, err := r.Keys(bounded(r.t)); err != nil || len(keys) != 1 {
				r.t.Errorf("%d keys, %v; want one", len(keys), err)
			}
		},
		"a version": func(r *rig) { // one that is not known has the catalogue read
			if _, err := r.Version(bounded(r.t), "orders", 2); hsm.KindOf(err) != hsm.KeyNotFound {
				r.t.Errorf("version 2: %v", err)
			}
			if _, err := r.Version(bounded(r.t), "orders", 1); err != nil {
				r.t.Errorf("version 1: %v", err)
			}
		},
		"a new version": func(r *rig) {
			if k, err := r.Rotate(bounded(r.t), "orders", 0); err != nil || k.Current != 2 {
				r.t.Errorf("Rotate: %v", err)
			}
		},
	}
}

// A login or sessions that are lost take no other connection and cost no call. Private
// keys are not to be found without a login, which says nothing of them.
func TestLoginAndSessionsLost(t *testing.T) {
	for what, lose := range map[string]func(r *rig){"login": (*rig).logOut, "sessions": (*rig).closeSessions} {
		for name := range ladderUses(nil, nil, nil) {
			t.Run(what+", "+name, func(t *testing.T) {
				r := newRig(t)
				v, m := r.key("orders", 0), material(32)
				wrapped := r.wrap(v, m)
				lose(r)
				ladderUses(v, m, wrapped)[name](r)
				r.opens(v, wrapped, m)
				if n := r.attached(); n != 1 {
					t.Errorf("attached %d times, want once", n)
				}
			})
		}
	}
}
