package quota

import "time"

// Remarshal parses a state file and writes it again.
func Remarshal(content []byte) ([]byte, error) {
	s, err := parseState(content)
	if err != nil {
		return nil, err
	}
	return s.marshal()
}

// Days returns the clock of a Keeper: its day and what is left of it.
func Days(boot func() time.Duration, wall func() time.Time) func() (int64, time.Duration) {
	c := &clock{boot: boot, wall: wall}
	return c.day
}
