// Kms-agent-pkcs11 is the backend of kms-agent for keys inside PKCS#11 tokens. The
// agent starts it as a plugin; `kms-agent hsm` runs it to administer keys.
package main

import (
	"fmt"
	"os"

	"github.com/kms-agent/kms-agent/plugins"
)

func main() {
	if len(os.Args) > 1 {
		os.Exit(administerOnce(os.Args[1:]))
	}
	if err := plugins.Serve(newBackend()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
