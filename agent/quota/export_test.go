package quota

// Remarshal parses a state file and writes it again.
func Remarshal(content []byte) ([]byte, error) {
	s, err := parseState(content)
	if err != nil {
		return nil, err
	}
	return s.marshal()
}
