package agent

import _ "embed"

//go:embed config_default.yaml
var defaultConfig string

// DefaultConfig returns an annotated configuration to start from.
func DefaultConfig() []byte { return []byte(defaultConfig) }
