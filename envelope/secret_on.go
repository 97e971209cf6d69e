//go:build goexperiment.runtimesecret

package envelope

import "runtime/secret"

// inSecret runs f and then erases the registers and stack that it used, and
// its heap allocations once they are unreachable.
func inSecret(f func()) { secret.Do(f) }
