package kms

// Settle waits for the calls upstream that nobody waits for.
func (s *Service) Settle() { s.strays.wait() }
