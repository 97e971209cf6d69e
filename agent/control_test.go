package agent_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/plugins/local"
)

// administrator is configText with every operation for this user.
func administrator(replace ...string) string {
	return strings.Replace(configText(replace...), "operations: [status]", "operations: [break-glass]", 1)
}

// admin connects to the admin door.
func (r *rig) admin() adminv1.AdminClient {
	r.t.Helper()
	conn, err := grpc.NewClient("unix:"+r.path("admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = conn.Close() })
	return adminv1.NewAdminClient(conn)
}

func (r *rig) auditLog() string {
	r.t.Helper()
	text, err := os.ReadFile(r.path("audit.log"))
	if err != nil {
		r.t.Fatal(err)
	}
	return string(text)
}

func TestEvictByAdministrator(t *testing.T) {
	r := newRig(t, administrator())
	r.start()
	c, admin := r.as("orders"), r.admin()
	version := 1
	encrypt := func() {
		t.Helper()
		answer, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
		if err != nil || answer.GetKeyUse().GetKeyVersion() != fmt.Sprint(version) {
			t.Fatalf("encrypt: %v, %v; want version %d", answer.GetKeyUse(), err, version)
		}
	}
	encrypt()
	ks, err := local.Open(r.path("keystore"), local.Seal{KeyFile: r.path("keystore.key")})
	if err != nil {
		t.Fatal(err)
	}
	defer ks.Close()
	for _, request := range []*adminv1.EvictRequest{{Key: "orders"}, {All: true}} {
		before := r.await("a cached data key", func(s *adminv1.StatusResponse) bool { return s.GetCache().GetEncryptionKeys() == 1 })
		if _, err := ks.Rotate("orders"); err != nil {
			t.Fatal(err)
		}
		encrypt() // as before: what is cached is used
		version++
		answer, err := admin.Evict(t.Context(), request)
		if err != nil || answer.GetEvicted() != 1 {
			t.Errorf("evict %v = %v, %v", request, answer, err)
		}
		encrypt()
		after, err := r.status()
		if err != nil || after.GetCache().GetMisses() != before.GetCache().GetMisses()+1 {
			t.Errorf("misses: %d, then %d (%v); want upstream asked again", before.GetCache().GetMisses(), after.GetCache().GetMisses(), err)
		}
	}
	for _, wrong := range []*adminv1.EvictRequest{{}, {Key: "orders", All: true}, {Key: "missing"}} {
		if _, err := admin.Evict(t.Context(), wrong); status.Code(err) != codes.InvalidArgument {
			t.Errorf("evict %v: %v, want INVALID_ARGUMENT", wrong, err)
		}
	}
	log := r.auditLog()
	if strings.Count(log, `"operation":"evict"`) != 10 || !strings.Contains(log, `"kind":"start"`) {
		t.Errorf("audit log lacks starts and ends of evictions:\n%s", log)
	}
}

func TestReloadByAdministrator(t *testing.T) {
	r := newRig(t, administrator())
	r.start()
	answer, err := r.admin().Reload(t.Context(), &adminv1.ReloadRequest{})
	if err != nil || answer.GetGeneration() != 2 {
		t.Errorf("reload = %v, %v; want generation 2", answer, err)
	}
	r.write(administrator() + "rubbish: true\n")
	_, err = r.admin().Reload(t.Context(), &adminv1.ReloadRequest{})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "rubbish") {
		t.Errorf("reload of a faulty file: %v, want the fault", err)
	}
	if _, err := r.as("orders").Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"}); err != nil {
		t.Errorf("after a faulty reload: %v", err)
	}
}

// A plugin is replaced while it is used, and no call fails.
func TestPluginRestartByAdministrator(t *testing.T) {
	r := newRig(t, administrator())
	r.start()
	before, err := r.status()
	if err != nil {
		t.Fatal(err)
	}
	c := r.as("orders")
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		var failed error
		for ctx.Err() == nil && failed == nil {
			if _, err := c.Wrap(ctx, &kmsagentv1.WrapRequest{Key: "orders", Plaintext: []byte("x")}); ctx.Err() == nil {
				failed = err
			}
		}
		done <- failed
	}()
	answer, err := r.admin().RestartPlugin(t.Context(), &adminv1.RestartPluginRequest{Backend: "local"})
	if err != nil || answer.GetPid() == 0 || answer.GetPid() == before.GetBackends()[0].GetPid() {
		t.Errorf("restart = %v, %v", answer, err)
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("a call failed during the replacement: %v", err)
	}
	if _, err := r.admin().RestartPlugin(t.Context(), &adminv1.RestartPluginRequest{Backend: "none"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("restart of no backend: %v", err)
	}
	// Without its keystore a new process does not work, and the old one goes on.
	if err := os.Rename(r.path("keystore"), r.path("away")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.admin().RestartPlugin(t.Context(), &adminv1.RestartPluginRequest{Backend: "local"}); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "keystore") {
		t.Errorf("restart that cannot work: %v, want the cause", err)
	}
	if err := os.Rename(r.path("away"), r.path("keystore")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wrap(t.Context(), &kmsagentv1.WrapRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
		t.Errorf("the old process: %v", err)
	}
}

func TestLogLevelByAdministrator(t *testing.T) {
	r := newRig(t, administrator())
	level := zap.NewAtomicLevel()
	r.level = &level
	r.start()
	set := func(request *adminv1.SetLogLevelRequest) *adminv1.SetLogLevelResponse {
		t.Helper()
		answer, err := r.admin().SetLogLevel(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
	eventually := func(want zapcore.Level) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); level.Level() != want; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("level %v, want %v", level, want)
			}
		}
	}
	if got := set(&adminv1.SetLogLevelRequest{Level: "debug"}); got.GetPrevious() != "info" || level.Level() != zap.DebugLevel {
		t.Errorf("level %v after %v", level, got)
	}
	set(&adminv1.SetLogLevelRequest{})
	eventually(zap.InfoLevel)
	set(&adminv1.SetLogLevelRequest{Level: "error", For: durationpb.New(50 * time.Millisecond)})
	eventually(zap.InfoLevel)
	// The configuration's word counts when it changes.
	set(&adminv1.SetLogLevelRequest{Level: "debug"})
	r.write(administrator() + "log: { level: warn }\n")
	eventually(zap.WarnLevel)
	for _, wrong := range []*adminv1.SetLogLevelRequest{{Level: "loud"}, {Level: "info", For: durationpb.New(-1)}} {
		if _, err := r.admin().SetLogLevel(t.Context(), wrong); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v, want INVALID_ARGUMENT", wrong, err)
		}
	}
}

func TestProfileByAdministrator(t *testing.T) {
	r := newRig(t, administrator())
	r.start()
	take := func(request *adminv1.ProfileRequest) ([]byte, error) {
		stream, err := r.admin().Profile(t.Context(), request)
		var profile []byte
		for err == nil {
			var part *adminv1.ProfileResponse
			part, err = stream.Recv()
			profile = append(profile, part.GetData()...)
		}
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return profile, err
	}
	for _, request := range []*adminv1.ProfileRequest{
		{Name: "heap"}, {Name: "goroutine"}, {Name: "cpu", Duration: durationpb.New(100 * time.Millisecond)},
	} {
		profile, err := take(request)
		if err != nil {
			t.Errorf("%v: %v", request, err)
			continue
		}
		if _, err := gzip.NewReader(bytes.NewReader(profile)); err != nil {
			t.Errorf("%v: %d bytes that are no profile: %v", request, len(profile), err)
		}
	}
	for _, wrong := range []*adminv1.ProfileRequest{
		{}, {Name: "cmdline"}, {Name: "cpu"}, {Name: "cpu", Duration: durationpb.New(time.Hour)}, {Name: "heap", Duration: durationpb.New(time.Second)},
	} {
		if _, err := take(wrong); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v, want INVALID_ARGUMENT", wrong, err)
		}
	}
}

// Duties are apart: who may look may not change.
func TestAdminRolesAreApart(t *testing.T) {
	r := newRig(t, strings.Replace(configText(), "operations: [status]", "operations: [auditor]", 1))
	r.start()
	ctx, admin := t.Context(), r.admin()
	_, evict := admin.Evict(ctx, &adminv1.EvictRequest{All: true})
	_, reload := admin.Reload(ctx, &adminv1.ReloadRequest{})
	_, restart := admin.RestartPlugin(ctx, &adminv1.RestartPluginRequest{Backend: "local"})
	_, level := admin.SetLogLevel(ctx, &adminv1.SetLogLevelRequest{Level: "debug"})
	profile, err := admin.Profile(ctx, &adminv1.ProfileRequest{Name: "heap"})
	if err == nil {
		_, err = profile.Recv()
	}
	for name, err := range map[string]error{"evict": evict, "reload": reload, "restart-plugin": restart, "set-log-level": level, "profile": err} {
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s by an auditor: %v, want PERMISSION_DENIED", name, err)
		}
		if !strings.Contains(r.auditLog(), `"operation":"`+name+`","outcome":"denied"`) {
			t.Errorf("the refusal of %s is not on record", name)
		}
	}
}

// Callers of other users get to the socket through the directory that the agent
// makes, and the socket's own mode says who may connect.
func TestRuntimeDirectoryLetsCallersThrough(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	for name, want := range map[string]os.FileMode{"run": 0o711, "state": 0o700} {
		info, err := os.Stat(r.path(name))
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want mode %v", name, info.Mode(), err, want)
		}
	}
}

// Records tell under which configuration they were decided.
func TestConfigurationIsOnRecord(t *testing.T) {
	r := newRig(t, administrator())
	r.start()
	if _, err := r.admin().Reload(t.Context(), &adminv1.ReloadRequest{}); err != nil {
		t.Fatal(err)
	}
	r.write(administrator() + "# changed\n")
	if _, err := r.admin().Reload(t.Context(), &adminv1.ReloadRequest{}); err != nil {
		t.Fatal(err)
	}
	var digests []string
	for line := range strings.Lines(r.auditLog()) {
		if strings.Contains(line, `"operation":"configuration-in-use"`) {
			_, digest, _ := strings.Cut(line, "SHA-256 of its files ")
			digests = append(digests, digest[:64])
		}
	}
	if len(digests) < 3 || digests[0] != digests[1] || digests[len(digests)-1] == digests[0] {
		t.Errorf("digests on record: %v, want the same twice and then another", digests)
	}
}
