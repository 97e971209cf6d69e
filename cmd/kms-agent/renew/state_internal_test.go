package renew

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

const stateHead = `{"format":"kms-agent reencrypt state 1","settings":{}}` + "\n"

// FuzzParseState: whatever stands in the file, what is read of it reads the same
// when it is written again, and no more is called whole than there is.
func FuzzParseState(f *testing.F) {
	f.Add([]byte(stateHead))
	f.Add([]byte(stateHead + `{"path":"/a","outcome":"renewed","key":"k","wrapping_keys":[{"uri":"u","version":"1"}],"size":3}` + "\n"))
	f.Add([]byte(stateHead + `{"path":"","path_base64":"L/8=","outcome":"failed","reason":"CHANGED"}` + "\n" + `{"pa`))
	f.Add([]byte(stateHead + `{"path":"/a","outcome":"failed","wrapping_keys":[],"message":"\xff"}` + "\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		records, whole, err := parseState(bytes.NewReader(text), &Settings{})
		if err != nil {
			if !errors.Is(err, ErrState) && !errors.Is(err, ErrStateSettings) {
				t.Fatalf("error %v", err)
			}
			return
		}
		if whole > int64(len(text)) || whole > 0 && text[whole-1] != '\n' {
			t.Fatalf("%d bytes of %d are whole", whole, len(text))
		}
		again := []byte(stateHead)
		for _, r := range records {
			line, err := r.marshal()
			if err != nil {
				t.Fatal(err)
			}
			again = append(again, line...)
		}
		if read, _, err := parseState(bytes.NewReader(again), &Settings{}); err != nil || !cmp.Equal(read, records) {
			t.Fatalf("%v, %v", err, cmp.Diff(records, read))
		}
	})
}

// TestEveryPathComesBack: names are any bytes, and the state keeps them apart.
func TestEveryPathComesBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := map[string]Record{}
		text := []byte(stateHead)
		for _, name := range rapid.SliceOf(rapid.SliceOfN(rapid.Byte(), 0, 300)).Draw(t, "names") {
			r := Record{
				Path: "/" + string(name), Outcome: Renewed, Key: "k", Wrapping: []Wrapping{{"u", "1"}},
				Size: rapid.Int64().Draw(t, "size"), Mtime: rapid.Int64().Draw(t, "mtime"), Inode: rapid.Uint64().Draw(t, "inode"),
			}
			want[r.Path] = r
			line, err := r.marshal()
			if err != nil {
				t.Fatal(err)
			}
			text = append(text, line...)
		}
		torn := text[:len(text)-rapid.IntRange(0, 1).Draw(t, "cut")]
		got, whole, err := parseState(bytes.NewReader(torn), &Settings{})
		if err != nil || len(torn) == len(text) && (whole != int64(len(text)) || !cmp.Equal(got, want)) {
			t.Fatalf("%v, %s", err, cmp.Diff(want, got))
		}
	})
}

func TestStateFilesThatAreRefused(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		text string
		want error
	}{
		"text":          {"hello\n", ErrState},
		"no whole line": {"hello", ErrState},
		"other format":  {`{"format":"x","settings":{}}` + "\n", ErrState},
		"no settings":   {`{"format":"kms-agent reencrypt state 1"}` + "\n", ErrState},
		"other key":     {`{"format":"kms-agent reencrypt state 1","settings":{"to_key":"b"}}` + "\n", ErrStateSettings},
		"rubbish":       {stateHead + "rubbish\n", ErrState},
		"relative path": {stateHead + `{"path":"a","outcome":"failed"}` + "\n", ErrState},
		"outcome":       {stateHead + `{"path":"/a","outcome":"current"}` + "\n", ErrState},
		"unknown field": {stateHead + `{"path":"/a","outcome":"failed","colour":1}` + "\n", ErrState},
		"two values":    {stateHead + `{"path":"/a","outcome":"failed"}{}` + "\n", ErrState},
		"long line":     {stateHead + `{"path":"/` + strings.Repeat("a", maxStateLine) + `"}` + "\n", ErrState},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenState(path, Settings{ToKey: ""}); !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if now, err := os.ReadFile(path); err != nil || string(now) != c.text {
				t.Errorf("the file was changed: %v", err)
			}
		})
	}
	if _, err := OpenState(dir, Settings{}); err == nil {
		t.Error("a directory is taken for a state file")
	}
	if _, err := OpenState(filepath.Join(dir, "no", "state"), Settings{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

func TestStateGoesOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	settings := Settings{ReplaceContext: true, NewContext: map[string]string{}}
	s, err := OpenState(path, settings)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenState(path, settings); !errors.Is(err, ErrStateBusy) {
		t.Errorf("a second run: %v, want %v", err, ErrStateBusy)
	}
	done := Record{Path: "/a", Outcome: Renewed, Key: "k", Wrapping: []Wrapping{{"u", "1"}}}
	for _, r := range []Record{{Path: "/a", Outcome: Failed, Reason: "X"}, done, {Path: "/b", Outcome: Failed}} {
		if err := s.Append(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(whole, `{"path":"/c`...), 0o600); err != nil {
		t.Fatal(err)
	}
	settings.NewContext = nil // the same as an empty one
	if s, err = OpenState(path, settings); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if r, ok := s.Done("/a"); !ok || !cmp.Equal(r, done) {
		t.Errorf("/a is %v, %v", r, ok)
	}
	if _, ok := s.Done("/b"); ok {
		t.Error("what failed is taken for done")
	}
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, whole) {
		t.Errorf("the torn line is still there: %q, %v", now, err)
	}
}

func TestFilter(t *testing.T) {
	for _, c := range []struct {
		include, exclude []string
		below            string
		want             bool
	}{
		{nil, nil, "a/b.enc", true},
		{[]string{"*.enc"}, nil, "a/b.enc", true},
		{[]string{"*.enc"}, nil, "a/b.txt", false},
		{[]string{"a/*.enc"}, nil, "a/b.enc", true},
		{[]string{"a/*.enc"}, nil, "c/a/b.enc", false},
		{[]string{"*.enc"}, []string{"b.*"}, "a/b.enc", false},
	} {
		f := Filter{Include: c.include, Exclude: c.exclude}
		if got := f.includes(c.below); got != c.want || f.Check() != nil {
			t.Errorf("include %q, exclude %q: %s is %v, want %v", c.include, c.exclude, c.below, got, c.want)
		}
	}
	for _, pattern := range []string{"[", ""} {
		if (&Filter{Exclude: []string{pattern}}).Check() == nil {
			t.Errorf("pattern %q is taken", pattern)
		}
	}
	older := Filter{OlderThan: 10}
	for version, want := range map[string]bool{"9": true, "10": false, "11": false} {
		if got, err := older.means(NewLabel("k", Wrapping{"u", version})); err != nil || got != want {
			t.Errorf("version %s: %v, %v, want %v", version, got, err, want)
		}
	}
	var known *fault
	if _, err := older.means(NewLabel("k", Wrapping{"u", "2024-a"})); !errors.As(err, &known) || known.reason != ReasonVersion {
		t.Errorf("a version that is no number: %v", err)
	}
}
