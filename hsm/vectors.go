package hsm

import "sync"

// errVector says that a token chose one initialization vector twice: who has both
// results can forge.
var errVector = &Error{Kind: Broken, Detail: "the token used one initialization vector twice: it must not be used"}

// vectors remembers the last initialization vector that a version wrapped with. A token
// whose generator stands still gives it again; one that begins anew after each start
// gives that of the canary again.
type vectors struct {
	mu   sync.Mutex
	last [maxIV]byte // mu guards last and size
	size int
}

// repeats takes the vector of a wrap and tells whether it is one that was used before,
// as far as that is known.
func (v *Version) repeats(iv []byte) bool {
	if v.Suite != GCM {
		return false // only there does it matter: the others are ours, or there are none
	}
	_, canary, _, _ := parseWrapped(v.canary) // there is none yet when it is made
	v.used.mu.Lock()
	defer v.used.mu.Unlock()
	if string(iv) == string(v.used.last[:v.used.size]) || string(iv) == string(canary) {
		return true
	}
	v.used.size = copy(v.used.last[:], iv)
	return false
}
