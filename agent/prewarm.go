package agent

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/serve/native"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/envelope"
)

const (
	// maxPrewarm is how many data keys are held for one key at most.
	maxPrewarm = 1000
	// maxPrewarmLine bounds one line of a list of encrypted data keys, in bytes.
	maxPrewarmLine = 256 << 10
	// prewarmEvery is how often, at most, it is seen to that they are there.
	prewarmEvery = time.Minute
	// prewarmSoon is when it is tried again after one is missing, and twice as long each
	// time after that.
	prewarmSoon = time.Second
)

// prewarmer has data keys ready that the configuration names.
type prewarmer struct {
	files map[string]prewarmFile // by path; the loop's own, as round is
	round uint64

	mu   sync.Mutex
	held map[string]kms.Held // by key; mu guards held and wanted
	want map[string]int
}

func newPrewarmer() prewarmer {
	return prewarmer{files: map[string]prewarmFile{}, held: map[string]kms.Held{}, want: map[string]int{}}
}

// prewarmFile is what was read of a file, until it changes.
type prewarmFile struct {
	stamp string
	round uint64 // in which it was named last
	keys  []kms.Sealed
	err   error
}

// prewarm sees to it that the data keys are in the cache, until ctx ends.
func (a *Agent) prewarm(ctx context.Context) error {
	soon := prewarmSoon
	for {
		wait, complete := prewarmEvery, true
		for _, k := range a.configuration().Keys {
			if len(k.Prewarm) > 0 {
				complete = a.prewarmKey(ctx, k) && complete
				wait = min(wait, max(time.Second, k.Cache.MaxAge/2))
			}
		}
		a.prewarmed.forget()
		if complete {
			soon = prewarmSoon
		} else { // the backend may be starting
			wait, soon = min(wait, soon), min(2*soon, prewarmEvery)
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

// prewarmKey reports whether all are there.
func (a *Agent) prewarmKey(ctx context.Context, k KeyConfig) bool {
	p := &a.prewarmed
	keys, faults := p.read(k.Prewarm)
	held := a.service.Prewarm(ctx, k.Name, keys)
	if ctx.Err() != nil {
		return false
	}
	if held.Err == nil {
		held.Err = errors.Join(faults...)
	}
	p.mu.Lock()
	before := p.held[k.Name]
	p.held[k.Name], p.want[k.Name] = held, len(keys)
	p.mu.Unlock()
	switch {
	case held.Err != nil && (before.Err == nil || before.Err.Error() != held.Err.Error()):
		a.logger.Warn("data keys are not all held ready", zap.String("key", k.Name), zap.Int("ready", held.Ready), zap.Int("of", len(keys)), zap.Error(held.Err))
	case held.Err == nil && (before.Err != nil || held.Ready != before.Ready):
		a.logger.Info("data keys are held ready", zap.String("key", k.Name), zap.Int("ready", held.Ready))
	}
	return held.Err == nil
}

// of tells how many data keys of a key are held, of how many.
func (p *prewarmer) of(key string) (ready, wanted int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held[key].Ready, p.want[key]
}

// read returns what the files of some patterns hold. A file is read again when it
// has changed.
func (p *prewarmer) read(patterns []string) (keys []kms.Sealed, faults []error) {
	for _, pattern := range patterns {
		paths, err := filepath.Glob(pattern)
		if err == nil && len(paths) == 0 {
			err = errors.New("there is no such file")
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", pattern, err))
		}
		slices.Sort(paths)
		for _, path := range paths {
			f := p.file(path)
			if f.err != nil {
				faults = append(faults, fmt.Errorf("%s: %w", path, f.err))
			}
			keys = append(keys, f.keys...)
		}
	}
	if len(keys) > maxPrewarm {
		faults = append(faults, fmt.Errorf("%d data keys are named, and %d can be held for one key", len(keys), maxPrewarm))
		keys = keys[:maxPrewarm]
	}
	return keys, faults
}

func (p *prewarmer) file(path string) prewarmFile {
	info, err := os.Stat(path)
	if err != nil {
		return prewarmFile{err: bare(err)}
	}
	if !info.Mode().IsRegular() {
		return prewarmFile{err: errors.New("it is not a regular file")}
	}
	stamp := fmt.Sprint(info.Size(), info.ModTime().UnixNano())
	f, ok := p.files[path]
	if !ok || f.stamp != stamp {
		f = prewarmFile{stamp: stamp}
		f.keys, f.err = readPrewarm(path)
	}
	f.round = p.round
	p.files[path] = f
	return f
}

// forget drops what was read from files that are not named any more, or are gone.
func (p *prewarmer) forget() {
	maps.DeleteFunc(p.files, func(_ string, f prewarmFile) bool { return f.round != p.round })
	p.round++
}

// readPrewarm reads the header of a message, or a list of encrypted data keys: one
// JSON object a line, with encrypted_data_key as kms-agent datakey prints it and
// context.
func readPrewarm(path string) ([]kms.Sealed, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, bare(err)
	}
	defer func() { _ = file.Close() }()
	r := bufio.NewReader(file)
	if first, err := r.Peek(1); err == nil && strings.ContainsRune("{ \t\r\n", rune(first[0])) {
		return readPrewarmList(r)
	}
	return readPrewarmMessage(r)
}

func readPrewarmMessage(r io.Reader) ([]kms.Sealed, error) {
	m, err := envelope.NewReader(r)
	if err != nil {
		return nil, fmt.Errorf("it is no message: %w", err)
	}
	h := m.Header()
	return []kms.Sealed{{EDKs: h.EDKs, Context: h.Context}}, nil
}

func readPrewarmList(r io.Reader) ([]kms.Sealed, error) {
	var keys []kms.Sealed
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxPrewarmLine)
	for n := 1; lines.Scan() && len(keys) <= maxPrewarm; n++ {
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		var one kmsagentv1.DecryptDataKeyRequest // has just what is needed
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(lines.Bytes(), &one); err != nil || one.GetEncryptedDataKey() == nil {
			return keys, fmt.Errorf("line %d is no JSON object with encrypted_data_key and context", n)
		}
		keys = append(keys, kms.Sealed{EDKs: native.EDKs(one.GetEncryptedDataKey()), Context: one.GetContext()})
	}
	return keys, lines.Err()
}
