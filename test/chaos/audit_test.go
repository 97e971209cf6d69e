package chaos

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// auditRecord is what the checker reads of a record.
type auditRecord struct {
	RequestID string `json:"request_id"`
	MessageID string `json:"message_id"`
	Operation string `json:"operation"`
	Outcome   string `json:"outcome"`
	Caller    struct {
		SPIFFEID string `json:"spiffe_id"`
	} `json:"caller"`
}

// trail is what an audit log has.
type trail struct {
	requests, messages map[string]bool
	served             map[string]int // by caller and operation
}

// unrecorded verifies the audit log and finds answers without a record.
func (c *cluster) unrecorded(h *history) []violation {
	files, err := filepath.Glob(c.path("audit.log*")) // those that were rotated too
	if err == nil {
		err = c.run(append([]string{"audit", "verify", "--initial-key", c.path("initial.key")}, files...)...)
	}
	if err != nil {
		return []violation{{"audit", "the audit log does not verify: " + err.Error(), nil}}
	}
	have := trail{map[string]bool{}, map[string]bool{}, map[string]int{}}
	for _, file := range files {
		if err := have.read(file); err != nil {
			return []violation{{"audit", err.Error(), nil}}
		}
	}
	return have.lacks(h)
}

func (t trail) read(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r auditRecord
		if json.Unmarshal(lines.Bytes(), &r) != nil { // what a crash has torn, which the log says
			continue
		}
		t.requests[r.RequestID], t.messages[r.MessageID] = true, true
		if r.Outcome == "success" {
			t.served[r.Caller.SPIFFEID+" "+r.Operation]++
		}
	}
	return lines.Err()
}

// lacks finds answers that the trail does not have.
func (t trail) lacks(h *history) []violation {
	var found []violation
	served := map[string]int{}
	for _, c := range h.Calls {
		switch {
		case c.RequestID != "" && !t.requests[c.RequestID]:
			found = append(found, violation{"audit", "a refusal has no record in the audit log", c})
		case c.Reason == "" && c.Message != "" && !t.messages[c.Message]:
			found = append(found, violation{"audit", "a message was made of which the audit log knows nothing", c})
		case c.Reason == "":
			served["spiffe://example.org/"+c.Caller+" "+strings.TrimSuffix(c.Operation, "-stream")]++
		}
	}
	for name, n := range served {
		if t.served[name] < n {
			found = append(found, violation{"audit", fmt.Sprintf("%d answers to %s have %d records", n, name, t.served[name]), nil})
		}
	}
	return found
}
