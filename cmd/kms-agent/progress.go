package main

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// How long a transfer takes before its progress is shown, and how often then.
const (
	progressDelay    = time.Second
	progressInterval = 200 * time.Millisecond
)

// progress shows how far a transfer is, on a terminal and only when it lasts.
type progress struct {
	io.Reader
	done atomic.Int64
	stop func()
}

// startProgress counts what is read through the result's Read. total is -1
// where it is not known. stop ends the display; it may be called twice.
func startProgress(r io.Reader, total int64, to io.Writer, shown bool) *progress {
	p := &progress{Reader: r, stop: func() {}}
	if !shown {
		return p
	}
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		p.show(total, to, end)
	}()
	p.stop = sync.OnceFunc(func() {
		close(end)
		<-ended
	})
	return p
}

// Read counts.
func (p *progress) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	p.done.Add(int64(n))
	return n, err
}

func (p *progress) show(total int64, to io.Writer, end <-chan struct{}) {
	began := time.Now()
	timer := time.NewTimer(progressDelay)
	defer timer.Stop()
	drawn := false
	for {
		select {
		case <-end:
			if drawn {
				_, _ = io.WriteString(to, "\r\x1b[K")
			}
			return
		case <-timer.C:
			_, _ = io.WriteString(to, "\r\x1b[K"+progressLine(p.done.Load(), total, time.Since(began)))
			drawn = true
			timer.Reset(progressInterval)
		}
	}
}

func progressLine(done, total int64, took time.Duration) string {
	rate := float64(done) / max(took.Seconds(), 0.001)
	line := fmt.Sprintf("%s, %s/s", humanBytes(float64(done)), humanBytes(rate))
	if total > 0 {
		line = fmt.Sprintf("%3d%%  %s of %s, %s/s", min(100, done*100/total),
			humanBytes(float64(done)), humanBytes(float64(total)), humanBytes(rate))
		if left := float64(total - done); rate > 0 && left > 0 {
			line += ", " + (time.Duration(left/rate) * time.Second).String() + " left"
		}
	}
	return line
}

func humanBytes(n float64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for n >= 1024 && i < len(units)-1 {
		n /= 1024
		i++
	}
	if i == 0 {
		return fmt.Sprintf("%.0f B", n)
	}
	return fmt.Sprintf("%.1f %s", n, units[i])
}
