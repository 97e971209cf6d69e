package plugins

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// docs/plugins.md says what the code does: its table of classes, its limits and
// the names that others have to know.
func TestDocumentation(t *testing.T) {
	b, err := os.ReadFile("../docs/plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	codes := map[string]string{
		"Unavailable": "UNAVAILABLE", "Unauthenticated": "UNAUTHENTICATED", "PermissionDenied": "PERMISSION_DENIED",
		"FailedPrecondition": "FAILED_PRECONDITION", "NotFound": "NOT_FOUND", "DataLoss": "DATA_LOSS",
		"InvalidArgument": "INVALID_ARGUMENT", "Internal": "INTERNAL",
	}
	for _, class := range Classes() {
		row := ""
		for line := range strings.Lines(doc) {
			if strings.HasPrefix(line, fmt.Sprintf("| `%s` |", class)) {
				row = strings.TrimSpace(line)
			}
		}
		if code := codes[class.code().String()]; code == "" || !strings.HasSuffix(row, "| "+code+" |") {
			t.Errorf("class %s: the documentation has %q, want a row that ends with code %q", class, row, code)
		}
		if class.Definite() != strings.Contains(row, "a definite no") {
			t.Errorf("class %s: definite is %v, the documentation has %q", class, class.Definite(), row)
		}
	}
	h := Handshake()
	for _, want := range []string{
		h.MagicCookieKey, h.MagicCookieValue, errorDomain, sessionToPlugin, sessionToHost, bindingVersion,
		fmt.Sprintf("material 1 to %d bytes, result 1 to %d", MaxMaterialSize, MaxCiphertextSize),
		fmt.Sprintf("%d versions;", MaxVersions), fmt.Sprintf("1 to %d bytes of UTF-8", MaxNameSize),
		fmt.Sprintf("at most %d MiB", MaxMessageSize>>20), fmt.Sprintf("plugin protocol %d", protocolVersion),
		fmt.Sprintf("at most %d ms", answerMargin.Milliseconds()), vectorNonce, vectorCiphertext,
		fmt.Sprintf("1 to %d bytes, exactly as many", MaxRandomSize), fmt.Sprintf("capability `%s`", CapabilityRandom),
		fmt.Sprintf("the %d random bytes of a RandomRequest", randomNonceSize),
	} {
		if !strings.Contains(doc, want) {
			t.Errorf("the documentation lacks %q", want)
		}
	}
}
