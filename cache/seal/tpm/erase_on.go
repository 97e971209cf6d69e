//go:build goexperiment.runtimesecret

package tpm

import "runtime/secret"

// erasing runs f and wipes what it left on stack, in registers and, once
// collected, on the heap: the TPM library's copies of the secret.
func erasing(f func()) { secret.Do(f) }
