//go:build goexperiment.runtimesecret

package cache

import "runtime/secret"

// inSecret runs f and then erases the registers and stack that it used.
func inSecret(f func()) { secret.Do(f) }
