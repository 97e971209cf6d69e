package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/kms-agent/kms-agent/cmd/kms-agent/renew"
)

// progressKind is the value of --progress.
type progressKind string

const (
	progressAuto progressKind = "auto"
	progressJSON progressKind = "json"
	progressNone progressKind = "none"
)

// jsonInterval is the time between two lines of --progress json.
const jsonInterval = time.Second

// String, Set and Type make progressKind a flag.
func (k *progressKind) String() string { return string(*k) }

// Type names the flag's values in the help.
func (k *progressKind) Type() string { return "auto|json|none" }

// Set refuses any other word.
func (k *progressKind) Set(text string) error {
	switch progressKind(text) {
	case progressAuto, progressJSON, progressNone:
		*k = progressKind(text)
		return nil
	}
	return errors.New("must be auto, json or none")
}

// showTrees shows the progress of a run on standard error until stop is called:
// a line that changes, on a terminal, or lines of JSON. Otherwise nothing.
func (a *app) showTrees(ctx context.Context, r *renewal, paths []string) (stop func()) {
	line := r.progress == progressAuto && isTerminal(a.errOut) && !r.verbose
	if !line && r.progress != progressJSON {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	end := make(chan struct{})
	var shown sync.WaitGroup
	shown.Go(func() { renew.Survey(ctx, &r.Options, paths) })
	shown.Go(func() {
		if line {
			showLine(ctx.Done(), end, a.errOut, r.Progress)
		} else {
			showJSON(end, a.errOut, r.Progress)
		}
	})
	return func() {
		close(end)
		cancel()
		shown.Wait()
	}
}

// showLine draws the line. When the run is interrupted it says what that means.
func showLine(interrupted, end <-chan struct{}, to io.Writer, p *renew.Progress) {
	began := time.Now()
	ticker := time.NewTicker(progressInterval)
	defer ticker.Stop()
	defer func() { _, _ = io.WriteString(to, "\r\x1b[K") }()
	for {
		select {
		case <-end:
			return
		case <-interrupted:
			interrupted = nil
			_, _ = io.WriteString(to, "\r\x1b[Kfinishing the files under way; the same signal again ends at once\n")
		case <-ticker.C:
			if took := time.Since(began); took >= progressDelay {
				_, _ = io.WriteString(to, "\r\x1b[K"+treesLine(p.Look(), took))
			}
		}
	}
}

// showJSON prints a line each second, and a last one.
func showJSON(end <-chan struct{}, to io.Writer, p *renew.Progress) {
	encoder := json.NewEncoder(to)
	ticker := time.NewTicker(jsonInterval)
	defer ticker.Stop()
	for {
		select {
		case <-end:
			_ = encoder.Encode(p.Look()) // nobody else is there to be told
			return
		case <-ticker.C:
			_ = encoder.Encode(p.Look())
		}
	}
}

// fileWeight is how many bytes cost as much as a file does by itself.
const fileWeight = 64 << 10

// treesLine is the progress of a run for people.
func treesLine(s renew.Sight, took time.Duration) string {
	seconds := max(took.Seconds(), 0.001)
	line := fmt.Sprintf("%d files", s.Files)
	left := ""
	if s.TotalFiles > 0 {
		done, all := s.Files*fileWeight+s.Bytes, s.TotalFiles*fileWeight+s.TotalBytes
		line = fmt.Sprintf("%3d%%  %d of %d files", min(100, done*100/all), s.Files, s.TotalFiles)
		if done > 0 && all > done {
			rest := time.Duration(float64(all-done) / float64(done) * float64(took))
			left = ", " + max(rest.Round(time.Second), time.Second).String() + " left"
		}
	}
	line += fmt.Sprintf(", %s, %.0f files/s, %s/s%s", humanBytes(float64(s.Bytes)), float64(s.Files)/seconds, humanBytes(float64(s.Bytes)/seconds), left)
	if s.Failed > 0 {
		line += fmt.Sprintf(", %d failed", s.Failed)
	}
	if s.Waiting != "" {
		line += ", waiting: " + s.Waiting
	}
	return line
}

// treesResult is the summary as JSON prints it.
type treesResult struct {
	// Result is done, failed, stopped or interrupted.
	Result string `json:"result"`
	*renew.Summary
}

// printSummary prints what became of the files.
func (a *app) printSummary(s *renew.Summary, err error) error {
	if a.format == formatJSON {
		return a.printJSON(treesResult{resultOf(err), s})
	}
	var tables []string
	if len(s.Found) > 0 {
		tables = append(tables, foundTable(s).render(a.colours(a.out)))
	}
	tables = append(tables, outcomeTable(s).render(a.colours(a.out)))
	if len(s.Failures) > 0 {
		tables = append(tables, failureTable(s).render(a.colours(a.out)))
	}
	_, printErr := io.WriteString(a.out, strings.Join(tables, "\n"))
	return printErr
}

func resultOf(err error) string {
	var stopped *renew.StoppedError
	switch {
	case err == nil:
		return "done"
	case errors.Is(err, renew.ErrFailed):
		return "failed"
	case errors.As(err, &stopped):
		return "stopped"
	}
	return "interrupted"
}

func foundTable(s *renew.Summary) *table {
	t := &table{}
	t.header("KEY", "WRAPPING KEY", "VERSION", "FILES", "SIZE")
	for _, f := range s.Found {
		for i, w := range f.Wrapping {
			if i == 0 {
				t.row(f.Key, w.URI, w.Version, fmt.Sprint(f.Files), humanBytes(float64(f.Bytes)))
			} else { // another one that opens the same messages
				t.row("", w.URI, w.Version, "", "")
			}
		}
	}
	return t
}

func outcomeTable(s *renew.Summary) *table {
	t := &table{}
	t.header("OUTCOME", "FILES", "SIZE")
	none := true
	for _, o := range renew.Outcomes() {
		if c, ok := s.Counts[o]; ok {
			none = false
			t.row(string(o), fmt.Sprint(c.Files), humanBytes(float64(c.Bytes)))
		}
	}
	if none {
		t.row("no files", "0", humanBytes(0))
	}
	return t
}

func failureTable(s *renew.Summary) *table {
	t := &table{}
	t.header("FAILED", "REASON", "WHAT HAPPENED")
	for _, f := range s.Failures {
		t.row(f.Path, f.Reason, f.Message)
	}
	if more := s.Counts[renew.Failed].Files - int64(len(s.Failures)); more > 0 {
		t.row(fmt.Sprintf("and %d more", more), "", "")
	}
	return t
}
