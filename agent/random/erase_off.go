//go:build !goexperiment.runtimesecret

package random

// erasing runs f. Only builds with GOEXPERIMENT=runtimesecret erase the registers and
// stack that it used.
func erasing(f func()) { f() }
