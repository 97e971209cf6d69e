//go:build goexperiment.runtimesecret

package cache

import erase "runtime/secret"

// inSecret runs f and then erases the registers and stack that it used.
func inSecret(f func()) { erase.Do(f) }
