// Command kms-agent runs the agent, and uses and administers it.
package main

import (
	"context"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is the whole command but for the end of the process: it returns the exit
// code. SIGINT and SIGTERM end the context of every command; what then still
// runs cleans up.
func run(args []string, in, out, errOut *os.File) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	a := newApp(in, out, errOut, os.Getenv)
	root := newRoot(a)
	root.SetArgs(args)
	command, err := root.ExecuteContextC(ctx)
	return a.fail(ctx, command, err)
}
