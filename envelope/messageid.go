package envelope

// MessageIDOf returns the message ID of a message that Seal made; it checks
// nothing. The zero ID stands for bytes that are too short to be a message.
func MessageIDOf(message []byte) (id [MessageIDSize]byte) {
	const offset = 3 // version, suite
	if len(message) >= offset+MessageIDSize {
		copy(id[:], message[offset:])
	}
	return id
}
