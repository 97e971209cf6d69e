package hsmtest

import (
	"fmt"
	"os"
	"testing"
)

// NSS makes a token of NSS's softoken: a data base in Dir, named in Reserved, which
// every process must give it to C_Initialize; the environment says nothing. It takes
// no private data objects, has no officer's PIN, and never locks.
func NSS(t testing.TB) *Token {
	t.Helper()
	const certutil = "/usr/bin/certutil"
	k := newToken(t, "libsoftokn3.so", PIN, "", certutil)
	base := k.Path("nss")
	if err := os.Mkdir(base, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, certutil, "-N", "-d", "sql:"+base, "-f", k.PINFile)
	k.Reserved = fmt.Sprintf("configDir='sql:%s' certPrefix='' keyPrefix='' secmod='' dbTokenDescription='%s'", base, k.Label)
	k.Write = []string{base}
	return k
}
