package hsm

import (
	"io/fs"
	"os"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

var errPIN = &cryptoki.CallError{Function: "C_Login", Code: cryptoki.Error(pkcs11.CKR_PIN_INCORRECT)}

var errLoggedIn = &cryptoki.CallError{Function: "C_Login", Code: cryptoki.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)}

func writeFile(path, content string) error { return os.WriteFile(path, []byte(content), 0o600) }

func chmod(path string, mode fs.FileMode) error { return os.Chmod(path, mode) }
