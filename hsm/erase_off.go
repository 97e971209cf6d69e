//go:build !goexperiment.runtimesecret

package hsm

// erasing runs f and wipes what it left on the stack. Only builds with
// GOEXPERIMENT=runtimesecret also wipe what f left in registers and on the heap.
func erasing(f func()) {
	scrub(0) // a stack that grows while f runs would leave a copy behind
	f()
	scrub(0)
}

// scrubbed is more than what the functions that are erased use of the stack.
const scrubbed = 8 << 10

// scrub writes zeros over the stack below its caller.
//
//go:noinline
func scrub(i int) byte { //nolint:unparam // what is returned keeps the compiler from leaving the writes out
	var room [scrubbed]byte
	return room[i&(scrubbed-1)]
}
