package hsmtest

import (
	"bytes"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// echo has a line to somebody who answers what he is told, and a connection to it.
func echo(t *testing.T) (*line, net.Conn) {
	t.Helper()
	l := newLine(filepath.Join(t.TempDir(), "near"), filepath.Join(t.TempDir(), "far"))
	far, err := net.Listen("unix", l.far)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for c, err := far.Accept(); err == nil; c, err = far.Accept() {
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	if err := l.open(); err != nil {
		t.Fatal(err)
	}
	near, err := net.Dial("unix", l.near)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close(); l.close(); _ = far.Close() })
	return l, near
}

func ask(t *testing.T, c net.Conn, question []byte) []byte {
	t.Helper()
	if _, err := c.Write(question); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, len(question))
	if _, err := io.ReadFull(c, answer); err != nil {
		t.Fatal(err)
	}
	return answer
}

func TestThrottledLine(t *testing.T) {
	l, c := echo(t)
	question := bytes.Repeat([]byte("x"), 200)
	l.change(func(w *ways) { w.rate = 1000 })
	began := time.Now()
	if answer := ask(t, c, question); !bytes.Equal(answer, question) {
		t.Errorf("the answer is %q", answer)
	}
	if took := time.Since(began); took < 200*time.Millisecond {
		t.Errorf("200 bytes took %v at 1000 a second, want 200ms", took)
	}
}

func TestCorruptLine(t *testing.T) {
	l, c := echo(t)
	question := []byte("a question")
	l.change(func(w *ways) { w.clean, w.dirty = 1, 1 })
	for i, want := range []int{0, 1, 0} {
		differ := 0
		for j, b := range ask(t, c, question) {
			if b != question[j] {
				differ++
			}
		}
		if differ != want {
			t.Errorf("answer %d differs in %d bytes, want %d", i, differ, want)
		}
	}
}
