//go:build goexperiment.runtimesecret

package seal

import "runtime/secret"

// erasing runs f and wipes what it left on stack, in registers and, once
// collected, on the heap: key schedules and the inner states of HMAC.
func erasing(f func()) { secret.Do(f) }
