package agent_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/kms-agent/kms-agent/agent"
)

var update = flag.Bool("update", false, "write what was got into testdata/config and docs/configuration.md")

// TestConfigFaults reads testdata/config/*.txtar: a configuration, perhaps with
// policy files, and the file "faults" with everything that is to be said of it.
func TestConfigFaults(t *testing.T) {
	archives, err := filepath.Glob("testdata/config/*.txtar")
	if err != nil || len(archives) == 0 {
		t.Fatalf("no cases in testdata/config: %v", err)
	}
	for _, name := range archives {
		t.Run(filepath.Base(name), func(t *testing.T) {
			archive, err := txtar.ParseFile(name)
			if err != nil {
				t.Fatal(err)
			}
			dir, want := t.TempDir(), ""
			for _, file := range archive.Files {
				if file.Name == "faults" {
					want = string(file.Data)
					continue
				}
				write(t, filepath.Join(dir, file.Name), string(file.Data))
			}
			_, err = agent.LoadConfig(filepath.Join(dir, "config.yaml"))
			got := ""
			if err != nil {
				got = strings.ReplaceAll(err.Error(), dir+"/", "") + "\n"
			}
			if *update {
				archive.Files[len(archive.Files)-1].Data = []byte(got)
				write(t, name, string(txtar.Format(archive)))
			}
			if diff := cmp.Diff(want, got); diff != "" && !*update {
				t.Errorf("faults differ (-want +got):\n%s", diff)
			}
		})
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

const smallest = `version: 1
trust_domain: example.org
state_dir: state
identity: { static_peers: [{ uid: 1000, id: spiffe://example.org/a }] }
audit: { file: audit.log, initial_key: audit.key }
`

func load(t *testing.T, content string) (*agent.Config, string) {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "config.yaml"), content)
	cfg, err := agent.LoadConfig(filepath.Join(dir, "config.yaml"))
	if err != nil {
		t.Fatalf("LoadConfig: %v", err)
	}
	return cfg, dir
}

func TestConfigDefaults(t *testing.T) {
	cfg, dir := load(t, smallest+`
backends: [{ name: local, plugin: local, settings: { keystore: ks, seal: { key_file: seal.key } } }]
keys: [{ name: orders, backend: local, wrapping_key: "local:orders" }]
`)
	if want := filepath.Join(dir, "state"); cfg.StateDir != want {
		t.Errorf("StateDir = %s, want %s", cfg.StateDir, want)
	}
	wantListen := agent.ListenConfig{Native: agent.NativeConfig{Socket: "/run/kms-agent/kms.sock", Mode: 0o660}}
	if diff := cmp.Diff(wantListen, cfg.Listen); diff != "" {
		t.Errorf("Listen (-want +got):\n%s", diff)
	}
	wantCache := agent.KeyCacheConfig{
		MaxAge: 5 * time.Minute, MaxLifetime: 24 * time.Hour, MaxIdle: 6 * time.Hour,
		MaxMessages: 1e9, MaxBytes: 1 << 40, Partition: agent.PartitionCaller,
	}
	if diff := cmp.Diff(wantCache, cfg.Keys[0].Cache); diff != "" {
		t.Errorf("Cache (-want +got):\n%s", diff)
	}
	wantLimits := agent.LimitsConfig{
		MaxMessage: 1 << 20, MaxStream: 64 << 30, MaxDeadline: 30 * time.Second, DefaultDeadline: 10 * time.Second,
		MaxConcurrent: 1024, MaxConcurrentPerCaller: 128, MaxConnections: 4096, MaxConnectionsPerUser: 1024, DataKeyUse: 5 * time.Minute,
	}
	if diff := cmp.Diff(wantLimits, cfg.Limits); diff != "" {
		t.Errorf("Limits (-want +got):\n%s", diff)
	}
	if cfg.CompiledPolicy() == nil {
		t.Error("CompiledPolicy() = nil, want a policy that denies all")
	}
	if len(cfg.Admin.Allow) != 0 {
		t.Errorf("Admin.Allow = %v, want nobody", cfg.Admin.Allow)
	}
}

func TestConfigOverlaysDefaultsOfAnElement(t *testing.T) {
	cfg, _ := load(t, smallest+`
backends: [{ name: local, plugin: local, call_timeout: 9s, breaker: { failure_rate: 0.8 }, settings: { keystore: ks, seal: { credential: seal } } }]
keys:
  - { name: a, backend: local, wrapping_key: "local:a", cache: { max_age: 1m, max_bytes: 2GB } }
  - { name: b, backend: local, wrapping_key: "local:b" }
limits: { max_message: 1MiB }
`)
	if got := cfg.Backends[0]; got.CallTimeout != 9*time.Second || got.StartTimeout != 10*time.Second {
		t.Errorf("timeouts = %v, %v, want 9s as written and 10s by default", got.CallTimeout, got.StartTimeout)
	}
	if got, want := cfg.Backends[0].Breaker, (agent.BreakerConfig{Failures: 5, FailureRate: 0.8, MaxWait: 10 * time.Second}); got != want {
		t.Errorf("breaker = %+v, want %+v", got, want)
	}
	a, b := cfg.Keys[0].Cache, cfg.Keys[1].Cache
	if a.MaxAge != time.Minute || a.MaxBytes != 2e9 || a.MaxIdle != 6*time.Hour || b.MaxAge != 5*time.Minute {
		t.Errorf("caches = %+v and %+v, want written values over the defaults of each key", a, b)
	}
	if cfg.Limits.MaxMessage != 1<<20 || cfg.Limits.MaxConnections != 4096 {
		t.Errorf("limits = %+v", cfg.Limits)
	}
}

func TestConfigResolvesPathsAgainstItsDirectory(t *testing.T) {
	cfg, dir := load(t, strings.Replace(smallest, "identity: {", "identity: { workload_api: unix:api.sock,", 1)+`
runtime_dir: /run/x
listen: { native: { socket: k.sock } }
backends:
  - name: local
    plugin: local
    settings: { keystore: ks, seal: { passphrase_file: /abs/pass } }
  - name: other
    path: bin/plugin
    sha256: "`+strings.Repeat("ab", 32)+`"
    env: { MODE: fast }
    env_from_files: { TOKEN: token }
    settings: { file: stays/relative, list: [1, 2.5, null, true, text], deep: { a: { b: c } } }
`)
	got := []string{
		cfg.Listen.Native.Socket, cfg.Admin.Socket, cfg.Audit.File, cfg.Audit.InitialKey,
		cfg.Backends[1].Path, cfg.Backends[1].EnvFromFiles["TOKEN"], cfg.Identity.WorkloadAPI,
	}
	want := []string{
		dir + "/k.sock", "/run/x/admin.sock", dir + "/audit.log", dir + "/audit.key",
		dir + "/bin/plugin", dir + "/token", "unix://" + dir + "/api.sock",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("paths (-want +got):\n%s", diff)
	}
	for i, want := range []string{
		`{"keystore":"` + dir + `/ks","seal":{"passphrase_file":"/abs/pass"}}`,
		`{"deep":{"a":{"b":"c"}},"file":"stays/relative","list":[1,2.5,null,true,"text"]}`,
	} {
		if got := string(cfg.Backends[i].Settings); got != want || !json.Valid([]byte(got)) {
			t.Errorf("settings %d = %s, want %s", i, got, want)
		}
	}
}

func TestStandardOutputIsNoPath(t *testing.T) {
	cfg, _ := load(t, strings.Replace(smallest, "file: audit.log", `file: "-"`, 1))
	if cfg.Audit.File != "-" {
		t.Errorf("audit.file: got %q, want -", cfg.Audit.File)
	}
}

func TestPolicyFiles(t *testing.T) {
	dir := t.TempDir()
	rule := "- { name: %s, callers: [\"*\"], keys: [\"*\"], operations: [encrypt] }\n"
	write(t, filepath.Join(dir, "policy.d/b.yaml"), fmt.Sprintf(rule, "second"))
	write(t, filepath.Join(dir, "policy.d/a.yaml"), fmt.Sprintf(rule, "first"))
	write(t, filepath.Join(dir, "policy.d/ignored.txt"), "nonsense: [")
	config := filepath.Join(dir, "config.yaml")
	write(t, config, smallest+"policy:\n  "+fmt.Sprintf(rule, "own")+
		"policy_files: [policy.d/*.yaml, policy.d/a.yaml, none.d/*.yaml]\n")
	cfg, err := agent.LoadConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, rule := range cfg.Policy {
		names = append(names, rule.Name)
	}
	if diff := cmp.Diff([]string{"own", "first", "second"}, names); diff != "" {
		t.Errorf("rules (-want +got):\n%s", diff)
	}
	want := []string{config, dir + "/policy.d", dir + "/policy.d/a.yaml", dir + "/policy.d/b.yaml", dir + "/none.d"}
	if diff := cmp.Diff(want, cfg.Files()); diff != "" {
		t.Errorf("Files() (-want +got):\n%s", diff)
	}
}

func TestLoadConfigRefusesFiles(t *testing.T) {
	dir := t.TempDir()
	large := filepath.Join(dir, "large.yaml")
	write(t, large, strings.Repeat("#", 4<<20+1))
	open := filepath.Join(dir, "open.yaml")
	write(t, open, smallest)
	if err := os.Chmod(open, 0o666); err != nil {
		t.Fatal(err)
	}
	pipe, latin := filepath.Join(dir, "pipe.yaml"), filepath.Join(dir, "latin.yaml")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	write(t, latin, smallest+"# caf\xe9\n")
	for path, want := range map[string]string{
		large:                              "larger than 4MiB",
		open:                               "chmod o-w",
		dir:                                "not a regular file",
		filepath.Join(dir, "missing.yaml"): "no such file",
		pipe:                               "not a regular file",
		latin:                              "UTF-8",
	} {
		if _, err := agent.LoadConfig(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("LoadConfig(%s) = %v, want %q", path, err, want)
		}
	}
}

// A file of the largest size is judged in seconds, whatever is in it. Lists may
// be as long as a file.
func TestLargeConfigs(t *testing.T) {
	many := func(head, format string, size int) string {
		var b strings.Builder
		b.WriteString(head)
		for i := 0; b.Len() < size; i++ {
			b.WriteString(strings.ReplaceAll(format, "%d", strconv.Itoa(i)))
		}
		return b.String()
	}
	const size = 1 << 20
	const tooMany = "more than 1000 entries"
	keys := many(smallest+"backends: [{ name: b, plugin: local, settings: { keystore: k, seal: { key_file: f } } }]\nkeys:\n",
		"- { name: k%d, backend: b, wrapping_key: \"local:k%d\" }\n", size)
	for name, c := range map[string]struct{ text, want, not string }{
		"fields":           {many(smallest, "f%d:\n", size), tooMany, ""},
		"roles":            {many(smallest+"roles:\n", "  r%d: # a role\n    - encrypt\n", size), tooMany, ""},
		"labels":           {many(smallest+"keys:\n- name: k\n  labels:\n", "    \"l%d\": v\n", size), tooMany, ""},
		"unknown keys":     {many(keys+"policy:\n", "- name: r%d\n  keys: [ke%d]\n", 2*size), "is not known", tooMany},
		"as many as go":    {smallest + "roles:\n" + strings.Join(slices.Repeat([]string{"  r: [encrypt]\n"}, 1000), ""), "given twice", tooMany},
		"one more":         {smallest + "roles:\n" + strings.Join(slices.Repeat([]string{"  r: [encrypt]\n"}, 1001), ""), tooMany, ""},
		"settings of many": {many(smallest+"backends:\n", "- name: b%d\n  settings:\n    a: 1\n    b: { c: 1, d: 2 }\n", size), "has no program", tooMany},
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			_, err := agent.ParseConfig("/etc/kms-agent/config.yaml", []byte(c.text))
			if took := time.Since(began); took > time.Minute {
				t.Errorf("took %v", took)
			}
			text := fmt.Sprint(err)
			if !strings.Contains(text, c.want) || c.not != "" && strings.Contains(text, c.not) {
				t.Errorf("got %.300s, want %q and not %q", text, c.want, c.not)
			}
		})
	}
}

func TestDefaultConfigIsValid(t *testing.T) {
	cfg, err := agent.ParseConfig("/etc/kms-agent/config.yaml", agent.DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Keys[0].Name != "orders" {
		t.Errorf("first key = %q, want orders", cfg.Keys[0].Name)
	}
}

// TestDefaultConfigShowsDefaults: what the annotated file sets, where a default
// exists, is the default.
func TestDefaultConfigShowsDefaults(t *testing.T) {
	annotated, err := agent.ParseConfig("/etc/kms-agent/config.yaml", agent.DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	bare, err := agent.ParseConfig("/etc/kms-agent/config.yaml", []byte(smallest+
		"backends: [{ name: b, plugin: local, settings: { keystore: k, seal: { key_file: f } } }]\n"+
		"keys: [{ name: k, backend: b, wrapping_key: \"local:k\" }]\n"))
	if err != nil {
		t.Fatal(err)
	}
	for name, pair := range map[string][2]any{
		"listen":         {bare.Listen, annotated.Listen},
		"admin.socket":   {bare.Admin.Socket, annotated.Admin.Socket},
		"limits":         {bare.Limits, annotated.Limits},
		"cache":          {bare.Cache, annotated.Cache},
		"log":            {bare.Log, annotated.Log},
		"keys.cache":     {bare.Keys[0].Cache, annotated.Keys[0].Cache},
		"bundle_max_age": {bare.Identity.BundleMaxAge, annotated.Identity.BundleMaxAge},
		"write_timeout":  {bare.Audit.WriteTimeout, annotated.Audit.WriteTimeout},
	} {
		if diff := cmp.Diff(pair[0], pair[1]); diff != "" {
			t.Errorf("%s (-default +annotated):\n%s", name, diff)
		}
	}
}

// TestConfigurationIsDocumented holds the reference and the annotated file to the
// struct, every field stands in both, and docs/configuration.md to the reference.
func TestConfigurationIsDocumented(t *testing.T) {
	documented := map[string]bool{}
	for _, f := range agent.ExplainConfig("") {
		if documented[f.Path] || f.Value == "" || f.Default == "" || f.Meaning == "" {
			t.Errorf("the reference describes %s twice, or not wholly", f.Path)
		}
		documented[f.Path] = true
	}
	for _, path := range fieldPaths(reflect.TypeFor[agent.Config](), "") {
		if !documented[path] {
			t.Errorf("agent/config_reference.md has no row for %s", path)
		}
		name := path[strings.LastIndexAny(path, ".]")+1:]
		if !bytes.Contains(agent.DefaultConfig(), []byte(name+":")) && !strings.HasPrefix(path, "policy[]") {
			t.Errorf("the default configuration does not mention %s", path)
		}
		delete(documented, path)
	}
	for path := range documented {
		t.Errorf("agent/config_reference.md describes %s, which is no field", path)
	}
	const path = "../docs/configuration.md"
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, after, found := strings.Cut(string(page), "## Fields\n")
	switch {
	case !found:
		t.Fatalf("%s has no fields", path)
	case *update:
		if err := os.WriteFile(path, []byte(before+agent.ConfigReference()), 0o644); err != nil {
			t.Fatal(err)
		}
	case "## Fields\n"+after != agent.ConfigReference():
		t.Errorf("%s is not what agent/config_reference.md says: go test ./agent -run TestConfigurationIsDocumented -update", path)
	}
}

// The defaults in the reference are those of the code.
func TestReferenceTellsDefaults(t *testing.T) {
	cfg, err := agent.ParseConfig("/etc/kms-agent/config.yaml", []byte(smallest+
		"backends: [{ name: b, plugin: local, settings: { keystore: k, seal: { key_file: f } } }]\n"+
		"keys: [{ name: k, backend: b, wrapping_key: \"local:k\" }]\n"))
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, f := range agent.ExplainConfig("") {
		want, literal := strings.CutPrefix(f.Default, "`")
		want, end := strings.CutSuffix(want, "`")
		value, set := fieldAt(reflect.ValueOf(*cfg), f.Path)
		if !literal || !end || strings.Contains(want, "`") || !set {
			continue
		}
		if got := defaultText(value); got != strings.Trim(want, `"`) {
			t.Errorf("%s: the reference says %s, the default is %s", f.Path, f.Default, got)
		}
		checked++
	}
	if checked < 35 {
		t.Errorf("only %d defaults were compared", checked)
	}
}

// fieldAt returns the value of a field; false where it is in a list that is empty.
func fieldAt(v reflect.Value, path string) (reflect.Value, bool) {
	for name := range strings.SplitSeq(path, ".") {
		name, list := strings.CutSuffix(name, "[]")
		for field, value := range v.Fields() {
			if field.Tag.Get("yaml") == name {
				v = value
				break
			}
		}
		if list {
			if v.Len() == 0 {
				return v, false
			}
			v = v.Index(0)
		}
	}
	return v, true
}

func defaultText(v reflect.Value) string {
	switch value := v.Interface().(type) {
	case time.Duration:
		return strings.NewReplacer("h0m0s", "h", "m0s", "m").Replace(value.String())
	case agent.Mode:
		return fmt.Sprintf("%04o", uint32(value))
	default:
		return fmt.Sprint(value)
	}
}

func fieldPaths(t reflect.Type, prefix string) []string {
	var paths []string
	for field := range t.Fields() {
		name, ok := field.Tag.Lookup("yaml")
		if !ok {
			continue
		}
		inner, path := field.Type, prefix+name
		if inner.Kind() == reflect.Slice && inner.Elem().Kind() == reflect.Struct {
			inner, path = inner.Elem(), path+"[]"
		}
		if below := fieldPathsOf(inner, path+"."); len(below) > 0 {
			paths = append(paths, below...)
		} else {
			paths = append(paths, strings.TrimSuffix(path, "[]"))
		}
	}
	return paths
}

func fieldPathsOf(t reflect.Type, prefix string) []string {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	return fieldPaths(t, prefix)
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]agent.Size{
		"0": 0, "512": 512, "64KiB": 64 << 10, "4 MiB": 4 << 20, "1TiB": 1 << 40, "1kB": 1000, "3GB": 3e9, "7B": 7,
		"15PiB": 15 << 50,
	} {
		var got agent.Size
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("%q = %d, %v, want %d", text, got, err, want)
		}
		var back agent.Size
		if err := back.UnmarshalText([]byte(got.String())); err != nil || back != got {
			t.Errorf("%d is written %q, which reads as %d, %v", got, got, back, err)
		}
	}
	for _, text := range []string{"", "-1", "1.5MiB", "MiB", "1XiB", "99999999PiB", "1e3", "0x10"} {
		var got agent.Size
		if err := got.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q = %d, want an error", text, got)
		}
	}
}

func TestAccountsByNameAndNumber(t *testing.T) {
	cfg, _ := load(t, smallest+"admin: { allow: [{ uid: root, gid: 12, operations: [status] }] }\n")
	rule := cfg.Admin.Allow[0]
	if *rule.UID != 0 || *rule.GID != 12 {
		t.Errorf("uid, gid = %d, %d, want 0, 12", *rule.UID, *rule.GID)
	}
}

func TestConfigKeepsReading(t *testing.T) {
	// Nesting, width and repetition that would exhaust a careless reader.
	for name, data := range map[string]string{
		"flow":   "a: " + strings.Repeat("[", 100_000),
		"block":  strings.Repeat("- ", 100_000),
		"keys":   strings.Repeat("? ", 100_000),
		"faults": strings.Repeat("x: y\n", 5000),
		"bombs":  "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
	} {
		_, err := agent.ParseConfig("c.yaml", []byte(data))
		var faults agent.Faults
		if !errors.As(err, &faults) || len(faults) == 0 || len(faults) > 1000 {
			t.Errorf("%s: error is %T with %d faults", name, err, len(faults))
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add(agent.DefaultConfig())
	f.Add([]byte(smallest))
	for _, text := range []string{"", "a: [b", "? a : b", "- a\n- b", "a: &x 1", "x: {a: 1, a: 2}", "version: 1\n---\n", "a: |\n  x", "%"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 16<<10 || bytes.Contains(data, []byte("policy_files")) {
			return
		}
		cfg, err := agent.ParseConfig("/etc/c.yaml", data)
		if (cfg == nil) == (err == nil) {
			t.Fatalf("ParseConfig = %v, %v", cfg, err)
		}
		var faults agent.Faults
		if err != nil && !errors.As(err, &faults) {
			t.Fatalf("error is %T, want Faults", err)
		}
		for _, fault := range faults {
			if fault.File != "/etc/c.yaml" || fault.Line < 1 || fault.Column < 1 || fault.Message == "" {
				t.Errorf("fault without a place: %#v", fault)
			}
		}
	})
}
