package identity

import (
	"strings"
	"testing"
)

func TestUnitFromCgroup(t *testing.T) {
	for path, want := range map[string]string{
		"/system.slice/orders.service":                       "orders.service",
		"/system.slice/orders.service/worker":                "orders.service",
		"/orders.service":                                    "orders.service",
		"/init.scope":                                        "init.scope",
		"/system.slice/system-worker.slice/worker@1.service": "worker@1.service",
		"/user.slice/user-1000.slice/user@1000.service/app.slice/orders.service":    "user@1000.service",
		"/user.slice/user-1000.slice/session-3.scope":                               "session-3.scope",
		"/kubepods.slice/kubepods-pod1.slice/cri-containerd-1.scope/orders.service": "cri-containerd-1.scope",
		"/system.slice/_cpu.service":                                                "cpu.service",
		"/system.slice/__x.service":                                                 "_x.service",
		`/system.slice/mnt-my\x2ddisk.service`:                                      `mnt-my\x2ddisk.service`,
		"/system.slice/data.mount":                                                  "data.mount",
		"/":                                                                         noUnit,
		"":                                                                          noUnit,
		"system.slice/orders.service":                                               noUnit,
		"/system.slice":                                                             noUnit,
		"/system.slice/":                                                            noUnit,
		"//orders.service":                                                          noUnit,
		"/../orders.service":                                                        noUnit,
		"/../../system.slice/orders.service":                                        noUnit,
		"/./orders.service":                                                         noUnit,
		"/docker/0123/system.slice/orders.service":                                  noUnit,
		"/kubepods/burstable/orders.service":                                        noUnit,
		"/system.slice/orders.service (deleted)":                                    noUnit,
		"/system.slice/orders.service.d":                                            noUnit,
		"/system.slice/.service":                                                    noUnit,
		"/system.slice/" + strings.Repeat("a", 248) + ".service":                    noUnit,
		"/system.slice/a.service\n0::/system.slice/orders.service":                  noUnit,
		"/" + strings.Repeat("a.slice/", 500) + "orders.service":                    "orders.service",
		"/not-a-unit/user@1000.service/app.slice/orders.service/system.slice/orders.scope": noUnit,
	} {
		if got := unitFromCgroup(path); got != want {
			t.Errorf("%q: unit %q, want %q", path, got, want)
		}
	}
}

func TestUnifiedCgroup(t *testing.T) {
	for text, want := range map[string]string{
		"0::/system.slice/orders.service\n":                               "/system.slice/orders.service",
		"12:cpu:/a\n1:name=systemd:/b\n0::/system.slice/orders.service\n": "/system.slice/orders.service",
		"0::/\n": "/",
		"1:name=systemd:/system.slice/orders.service\n4:memory:/x\n": "",
		"10::/system.slice/orders.service\n":                         "",
		"":                                                           "",
	} {
		got, err := unifiedCgroup([]byte(text))
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %q, %v; want %q", text, got, err, want)
		}
	}
}

// FuzzUnit is any /proc/PID/cgroup. A unit that comes of it has a unit's name,
// and has nothing but slices before it.
func FuzzUnit(f *testing.F) {
	for _, seed := range []string{
		"0::/system.slice/orders.service\n", "1:name=systemd:/x\n0::/user.slice/user@1.service/a.slice/b.service\n", "0::/../a.service\n",
		"0::/_cpu.service\n", "0::\n", "0::/a.slice/_b.slice/c.scope (deleted)\n", "\n\n0::/x\x00.service",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, all []byte) {
		path, err := unifiedCgroup(all)
		if err != nil {
			return
		}
		unit := unitFromCgroup(path)
		if unit == noUnit {
			return
		}
		if !isUnitName(unit) || strings.HasSuffix(unit, ".slice") {
			t.Fatalf("%q is in %q", path, unit)
		}
		for part := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
			if strings.TrimPrefix(part, "_") == unit {
				return
			}
			if !strings.HasSuffix(part, ".slice") {
				t.Fatalf("%q is in %q, below %q", path, unit, part)
			}
		}
		t.Fatalf("%q is not in its path %q", unit, path)
	})
}
