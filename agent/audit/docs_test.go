package audit_test

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/agent/audit"
)

// fields lists the JSON names of a struct, with those of structs inside it.
func fields(t reflect.Type, prefix string) []string {
	var names []string
	for i := range t.NumField() {
		field := t.Field(i)
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		inner := field.Type
		if inner.Kind() == reflect.Pointer {
			inner = inner.Elem()
		}
		if inner.Kind() == reflect.Struct && inner.PkgPath() == t.PkgPath() && !strings.HasSuffix(prefix, "source.") {
			names = append(names, fields(inner, prefix+name+".")...)
			continue
		}
		names = append(names, prefix+name)
	}
	return names
}

func TestEveryFieldIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	want := fields(reflect.TypeFor[audit.Record](), "")
	for _, name := range append(want, "previous", "mac") {
		if !strings.Contains(string(text), "`"+name+"`") {
			t.Errorf("docs/audit.md does not tell of the field %s", name)
		}
	}
	for _, word := range []string{
		string(audit.KindOperation), string(audit.KindStart), string(audit.KindEnd), string(audit.KindEvent),
		string(audit.Success), string(audit.Denied), string(audit.Error),
		audit.EventStarted, audit.EventContinued, audit.EventRecovered, audit.EventTruncated, audit.EventGap,
		string(audit.ReasonEdited), string(audit.ReasonRemoved), string(audit.ReasonReordered), string(audit.ReasonInserted),
		string(audit.ReasonForked), string(audit.ReasonTorn), string(audit.ReasonWrongKey),
	} {
		if !strings.Contains(string(text), "`"+word+"`") {
			t.Errorf("docs/audit.md does not tell of %q", word)
		}
	}
}
