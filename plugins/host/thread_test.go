package host

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// A process outlives the thread that asked for it, though the kernel is told to kill
// it with the thread that forked it.
func TestProcessesOutliveWhoStartsThem(t *testing.T) {
	cmd := &exec.Cmd{
		Path: "/bin/sleep", Args: []string{"sleep", "1000"}, SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true},
	}
	r := newRunner(cmd, t.TempDir(), nil, zap.NewNop())
	thread, err := make(chan int, 1), make(chan error, 1)
	onThread(func() { // ends with this function
		runtime.LockOSThread()
		thread <- unix.Gettid()
		err <- r.Start(t.Context())
	})
	if err := <-err; err != nil {
		t.Fatal(err)
	}
	defer func() { r.kill(); <-r.ended }()
	task := fmt.Sprintf("/proc/self/task/%d", <-thread)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(task); os.IsNotExist(err) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the thread does not end")
		}
	}
	select {
	case <-r.ended:
		t.Errorf("the process ended with the thread: %v", r.end())
	case <-time.After(100 * time.Millisecond): // a kill takes less
	}
}
