package tpm

// MaskedSecret returns the secret in use with every byte masked, so that a
// search for the secret does not find it.
func MaskedSecret(s *Sealer, mask byte) (masked []byte, err error) {
	masked = make([]byte, 0, 32)
	erasing(func() {
		var secret []byte
		secret, err = s.unsealSecret(s.object)
		for _, b := range secret {
			masked = append(masked, b^mask)
		}
		clear(secret)
	})
	return masked, err
}

// Forget drops the secret in use.
func Forget(s *Sealer) { s.forget() }
