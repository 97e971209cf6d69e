//go:build !goexperiment.runtimesecret

package tpm

// erasing runs f. Only builds with GOEXPERIMENT=runtimesecret wipe what it left
// on stack, in registers and on the heap.
func erasing(f func()) { f() }
