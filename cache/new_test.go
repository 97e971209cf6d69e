package cache_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/cache"
)

func TestNewRefuses(t *testing.T) {
	complete := cache.Config{
		Now: func() time.Duration { return 0 }, MaxEntries: 1, Classify: classify,
		Confirm: func(context.Context, cache.Authority, any) error { return nil },
	}
	cases := map[string]func(*cache.Config){
		"no clock":         func(c *cache.Config) { c.Now = nil },
		"no Classify":      func(c *cache.Config) { c.Classify = nil },
		"no Confirm":       func(c *cache.Config) { c.Confirm = nil },
		"no entries":       func(c *cache.Config) { c.MaxEntries = 0 },
		"negative entries": func(c *cache.Config) { c.MaxEntries = -1 },
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			cfg := complete
			change(&cfg)
			if c, err := cache.New(cfg); err == nil {
				c.Close()
				t.Error("New succeeded")
			}
		})
	}
	c, err := cache.New(complete)
	if err != nil {
		t.Fatalf("the complete configuration: %v", err)
	}
	c.Close()
}

// memlockChild makes this binary a process that may lock one page only.
const memlockChild = "CACHE_TEST_MEMLOCK"

// TestLockedMemoryLimit: too small a limit is an error that names what is
// needed, what is allowed and the cure.
func TestLockedMemoryLimit(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), memlockChild+"=4096")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{"RLIMIT_MEMLOCK allows 4096", "LimitMEMLOCK=", "ulimit -l", "cache.max_entries", "3235840 bytes"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the error does not say %q: %s", want, out)
		}
	}
}

func newWithoutMemlock() int {
	runtime.LockOSThread() // what follows is this thread's only
	var none [2]unix.CapUserData
	err := errors.Join(
		unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 4096, Max: 4096}),
		// With CAP_IPC_LOCK there is no limit.
		unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]),
	)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	_, err = cache.New(cache.Config{
		Now: func() time.Duration { return 0 }, MaxEntries: 100_000, Classify: classify,
		Confirm: func(context.Context, cache.Authority, any) error { return nil },
	})
	fmt.Println(err)
	return 0
}
