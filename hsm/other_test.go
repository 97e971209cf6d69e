package hsm_test

import (
	"fmt"
	"os/exec"
	"testing"
)

// What another process changes on the token is seen within seconds.
func TestRotatedElsewhere(t *testing.T) {
	r := newRig(t)
	r.key("orders", 0)
	plugin := r.path("kms-agent-pkcs11")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", plugin, "../plugins/pkcs11").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	settings := fmt.Sprintf(`{"module":%q,"token":"pkcs11:token=kms","pin_file":%q,"state_dir":%q}`, softHSM, r.path("pin"), r.path("state"))
	r.write("request", fmt.Sprintf(`{"settings":%s,"command":"rotate","key":"orders"}`, settings))
	r.run("sh", "-c", plugin+" administer <"+r.path("request"))
	eventually(t, "the second version is seen", func() error {
		k, err := r.Key(t.Context(), "orders")
		if err == nil && k.Current != 2 {
			err = fmt.Errorf("the current version is %d", k.Current)
		}
		return err
	})
}
