package hsmtest_test

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// The token is what the fixture says, for this process and for others.
func TestSoftHSM(t *testing.T) {
	soft := hsmtest.NewSoftHSM(t)
	soft.Tool("--keygen", "--key-type", "AES:32", "--label", "a key")
	cmd := exec.Command("pkcs11-tool", "--module", hsmtest.SoftHSMModule, "--token-label", hsmtest.Label, "--login", "--pin", hsmtest.PIN, "--list-objects")
	cmd.Env = append([]string{"PATH=/usr/bin:/bin"}, soft.Env()...)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "a key") {
		t.Errorf("pkcs11-tool: %v\n%s", err, out)
	}
	ctx := pkcs11.New(hsmtest.SoftHSMModule)
	defer ctx.Destroy()
	if err := ctx.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ctx.Finalize() }()
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	info, err := ctx.GetTokenInfo(slots[0])
	if err != nil || info.Label != hsmtest.Label {
		t.Errorf("the token: %+v, %v", info, err)
	}
	session, err := ctx.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := ctx.Login(session, pkcs11.CKU_SO, hsmtest.OfficerPIN); err != nil {
		t.Errorf("the officer's PIN: %v", err)
	}
}
