package kms

import "context"

// Settle waits for the calls upstream that nobody waits for.
func (s *Service) Settle() { s.strays.wait() }

// Attend is one look at the keys that are not well.
func (s *Service) Attend(ctx context.Context) { s.attend(ctx) }
