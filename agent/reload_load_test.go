package agent_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// pressed uses the key orders in every way, some of which ask upstream each time.
// No call may fail. stop ends that and returns how many calls there were.
func (r *rig) pressed(c *client.Client) (stop func() int64) {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	var calls atomic.Int64
	var wg sync.WaitGroup
	message, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	if err != nil {
		r.t.Fatal(err)
	}
	for name, call := range map[string]func() error{
		"wrap": func() error {
			_, err := c.Wrap(ctx, &kmsagentv1.WrapRequest{Key: "orders", Plaintext: []byte("x")})
			return err
		},
		"encrypt": func() error {
			_, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders"})
			return err
		},
		"encrypt, confirmed": func() error {
			_, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", MaxStale: durationpb.New(0)})
			return err
		},
		"data key": func() error {
			_, err := c.GenerateDataKey(ctx, &kmsagentv1.GenerateDataKeyRequest{Key: "orders"})
			return err
		},
		"decrypt": func() error {
			_, err := c.Decrypt(ctx, &kmsagentv1.DecryptRequest{Message: message.GetMessage()})
			return err
		},
	} {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := call(); err != nil && ctx.Err() == nil {
					r.t.Errorf("%s: %v", name, err)
					return
				}
				calls.Add(1)
			}
		})
	}
	r.t.Cleanup(func() { cancel(); wg.Wait() })
	return sync.OnceValue(func() int64 { cancel(); wg.Wait(); return calls.Load() })
}

// reload reads the file again, which must be good.
func (r *rig) reload(admin adminv1.AdminClient) {
	r.t.Helper()
	if _, err := admin.Reload(r.t.Context(), &adminv1.ReloadRequest{}); err != nil {
		r.t.Fatalf("reload: %v", err)
	}
}

// plugins are the private directories of plugins, and processes the children of
// this process.
func (r *rig) leftovers() (directories, processes []string) {
	r.t.Helper()
	directories, err := filepath.Glob(r.path("run/plugin-*"))
	files, childrenErr := filepath.Glob("/proc/self/task/*/children")
	if err = errors.Join(err, childrenErr); err != nil {
		r.t.Fatal(err)
	}
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil { // else the thread has ended
			processes = append(processes, strings.Fields(string(text))...)
		}
	}
	return directories, processes
}

// wantOnly wants that many plugins, and nothing left of others.
func (r *rig) wantOnly(plugins int) {
	r.t.Helper()
	var directories, processes []string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if directories, processes = r.leftovers(); len(directories) == plugins && len(processes) == plugins {
			return
		}
	}
	r.t.Errorf("directories %v, processes %v; want those of %d plugins", directories, processes, plugins)
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// Limits of the backend, policy, keys and administrators change, and faulty files
// come in between: no call fails, and nothing is left of what was before.
func TestAHundredReloadsUnderLoad(t *testing.T) {
	r := newRig(t, administrator())
	r.start()
	admin, stop := r.admin(), r.pressed(r.as("orders"))
	r.reload(admin)
	fds, goroutines := openFiles(t), runtime.NumGoroutine()
	turns := [][]string{
		{"call_timeout: 2s", "call_timeout: 3s"},
		strangersToo,
		{"call_timeout: 2s", "max_concurrent: 16\n    breaker: { failures: 7 }"},
		{"  - { name: archive, backend: local, wrapping_key: \"local:archive\" }\n", ""},
		{"    keys: [orders]\n", "    keys: [orders]\n    limits: { rate: 100000/s, burst: 100000 }\n"},
	}
	faults := []string{"rubbish: true\n", "cache: { ttl: never }\n", "policy: []\n"}
	began, generation := time.Now(), uint64(0)
	for i := range 100 {
		if i >= 20 && time.Since(began) > 12*time.Second {
			break // the race detector makes starts many times as slow
		}
		r.write(administrator(turns[i%len(turns)]...))
		answer, err := admin.Reload(t.Context(), &adminv1.ReloadRequest{})
		if err != nil || answer.GetGeneration() <= generation {
			t.Fatalf("reload %d: %v, %v; want a generation after %d", i, answer, err, generation)
		}
		generation = answer.GetGeneration()
		if i%10 != 9 {
			continue
		}
		bad := strings.Replace(administrator(), "trust_domain: ", "trust_domain: other.", 1)
		if n := i / 10 % (len(faults) + 1); n < len(faults) {
			bad = administrator() + faults[n]
		}
		r.write(bad)
		if _, err := admin.Reload(t.Context(), &adminv1.ReloadRequest{}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("a faulty file: %v, want FAILED_PRECONDITION", err)
		}
	}
	r.write(administrator())
	r.reload(admin)
	if n := stop(); n < 100 {
		t.Errorf("%d calls are no load", n)
	}
	s, err := r.status()
	if err != nil || s.GetState() != "serving" || s.GetConfiguration().GetRejected() != "" {
		t.Errorf("status: %v, %v", s, err)
	}
	r.wantOnly(1)
	for deadline := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > goroutines || openFiles(t) > fds; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, before %d; %d descriptors, before %d", runtime.NumGoroutine(), goroutines, openFiles(t), fds)
		}
	}
	r.stop()
	r.wantOnly(0)
}

// swap puts a configuration into place as Kubernetes does: a directory of its own
// behind a link that is replaced at once.
func (r *rig) swap(n int, config string) {
	r.t.Helper()
	version := fmt.Sprintf("..version-%d", n)
	err := os.Mkdir(r.path(version), 0o700)
	if err == nil {
		err = os.WriteFile(filepath.Join(r.path(version), "kms-agent.yaml"), []byte(config), 0o600)
	}
	if err == nil {
		err = os.Symlink(version, r.path("..data_tmp"))
	}
	if err == nil {
		err = os.Rename(r.path("..data_tmp"), r.path("..data"))
	}
	if n > 0 && err == nil {
		err = os.RemoveAll(r.path(fmt.Sprintf("..version-%d", n-1)))
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

func TestConfigMapSwapsUnderLoad(t *testing.T) {
	r := newRig(t, "")
	r.swap(0, administrator())
	if err := errors.Join(os.Remove(r.config), os.Symlink("..data/kms-agent.yaml", r.config)); err != nil {
		t.Fatal(err)
	}
	r.start()
	stop := r.pressed(r.as("orders"))
	turns := []string{
		administrator("call_timeout: 2s", "call_timeout: 3s"), administrator(strangersToo...), administrator() + "rubbish: 1\n", administrator(),
	}
	generation := uint64(1)
	for i, config := range append(turns, turns...) {
		r.swap(i+1, config)
		s := r.await("the swapped file", func(s *adminv1.StatusResponse) bool {
			faulty := strings.Contains(config, "rubbish")
			return (s.GetConfiguration().GetGeneration() > generation) != faulty && (s.GetConfiguration().GetRejected() != "") == faulty
		})
		generation = s.GetConfiguration().GetGeneration()
	}
	if n := stop(); n < 100 {
		t.Errorf("%d calls are no load", n)
	}
	r.wantOnly(1)
}

// install writes a program that is this one with something at its end, and returns
// its digest.
func (r *rig) install(path, end string) (digest string) {
	r.t.Helper()
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		r.t.Fatal(err)
	}
	program = append(program, end...)
	if err := errors.Join(os.WriteFile(path+".new", program, 0o700), os.Rename(path+".new", path)); err != nil {
		r.t.Fatal(err)
	}
	sum := sha256.Sum256(program)
	return hex.EncodeToString(sum[:])
}

// The program of a backend is replaced by a new version: it takes over without a
// failed call, and one that is not what the configuration says does not.
func TestNewProgramUnderLoad(t *testing.T) {
	r := newRig(t, "")
	config := func(digest string) string {
		return administrator("    plugin: local\n    call_timeout: 2s\n", fmt.Sprintf(
			"    path: program\n    sha256: \"%s\"\n    env: { %s: %s }\n    access: { read: [\"%s\"] }\n", digest, faultVariable, r.path("fault"), r.dir),
			"keystore: keystore", "keystore: "+r.path("keystore"), "key_file: keystore.key", "key_file: "+r.path("keystore.key"))
	}
	r.fault("none")
	r.write(config(r.install(r.path("program"), "")))
	r.start()
	admin, stop := r.admin(), r.pressed(r.as("orders"))
	before, err := r.status()
	if err != nil {
		t.Fatal(err)
	}
	pid := before.GetBackends()[0].GetPid()
	for i := range 5 {
		digest := r.install(r.path("program"), strings.Repeat("x", i+1))
		r.write(config(digest))
		r.reload(admin)
		s, err := r.status()
		if err != nil {
			t.Fatal(err)
		}
		if b := s.GetBackends()[0]; b.GetPid() == pid || b.GetSha256() != digest || b.GetState() != "up" {
			t.Errorf("backend: %v; want another process than %d, of %s", b, pid, digest)
		}
		pid = s.GetBackends()[0].GetPid()
		r.write(config(strings.Repeat("0", 64)))
		if _, err := admin.Reload(t.Context(), &adminv1.ReloadRequest{}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("a program of another digest: %v", err)
		}
	}
	if n := stop(); n < 100 {
		t.Errorf("%d calls are no load", n)
	}
	r.wantOnly(1)
	r.stop()
	r.wantOnly(0)
}

// The backend is another one, by its settings or by a secret that was changed: what
// is under way goes on with the new one, and no call fails.
func TestOtherUpstreamUnderLoad(t *testing.T) {
	r := newRig(t, "")
	config := func(keystore string) string {
		return administrator("    call_timeout: 2s\n", "    env_from_files: { UNUSED_PIN: pin }\n", "keystore: keystore,", "keystore: "+keystore+",")
	}
	writeFile(t, r.path("pin"), "one")
	keystore, err := os.ReadFile(r.path("keystore"))
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, r.path("copy"), string(keystore))
	r.write(config("keystore"))
	r.start()
	admin, stop := r.admin(), r.pressed(r.as("orders"))
	for i := range 12 {
		switch i % 4 {
		case 0:
			r.write(config("copy"))
		case 2:
			r.write(config("keystore"))
		default:
			writeFile(t, r.path("pin"), fmt.Sprint(i))
		}
		r.reload(admin)
	}
	if n := stop(); n < 100 {
		t.Errorf("%d calls are no load", n)
	}
	r.wantOnly(1)
}
