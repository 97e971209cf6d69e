//go:build goexperiment.runtimesecret

package random

import "runtime/secret"

// erasing runs f and then erases the registers and stack that it used.
func erasing(f func()) { secret.Do(f) }
