package agent

import (
	"cmp"
	"slices"
	"strings"

	"github.com/kms-agent/kms-agent/agent/census"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// censusDays is how many days are told of where nobody says.
const censusDays = 30

// KeysHealth implements serve.Controller.
func (a *Agent) KeysHealth(key string, days int) *adminv1.KeysHealthResponse {
	if days <= 0 {
		days = censusDays
	}
	r := &adminv1.KeysHealthResponse{}
	switch err := a.census.Fault(); {
	case a.census == nil:
		r.Problem = "the file of the counts could not be read when the agent started; its log says why"
	case err != nil:
		r.Problem = err.Error()
	}
	sums := map[census.Kind]*adminv1.WrapCount{}
	for _, row := range a.census.Rows(days) {
		if key != "" && row.Key != key {
			continue
		}
		c := sums[row.Kind]
		if c == nil {
			c = &adminv1.WrapCount{Key: row.Key, Purpose: string(row.Purpose), Wraps: parseWraps(row.Wraps)}
			sums[row.Kind], r.Counts = c, append(r.Counts, c)
		}
		c.Count, c.LastDay = c.Count+row.Count, row.Day
	}
	slices.SortStableFunc(r.Counts, func(a, b *adminv1.WrapCount) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), strings.Compare(a.Purpose, b.Purpose))
	})
	return r
}

// parseWraps undoes what kms writes: BACKEND@VERSION, with spaces between.
func parseWraps(text string) []*adminv1.KeyWrap {
	var out []*adminv1.KeyWrap
	for wrap := range strings.FieldsSeq(text) {
		backend, version, _ := strings.Cut(wrap, "@")
		out = append(out, &adminv1.KeyWrap{Backend: backend, Version: version})
	}
	return out
}
