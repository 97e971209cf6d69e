package hsmtest

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCheckRules(t *testing.T) {
	good := []string{
		"dead", "no-slots", "lossy", "logged-out", "boast 0x10", "slots 1000", "iv written", "reused kmsagent/b/v1", "ill /bad/", "ill-wraps /bad/", "ill-opens /bad/", "ill-code 0x60", "ill-sleep 700", "C_Encrypt rv=0x30", "C_Encrypt rv=0", "* sleep_ms=5", "C_Logout hang",
		"C_Decrypt skip=3 count=1 sleep_ms=10 exit=255", "C_WaitForSlotEvent segv", "C_Sign abort count=1",
	}
	if err := checkRules(good); err != nil {
		t.Errorf("good rules: %v", err)
	}
	for rule, want := range map[string]string{
		"":                                 `"" is neither a function`,
		" C_Encrypt rv=1":                  `"" is neither a function`,
		"C_Encrypt":                        "it does nothing",
		"C_Encrypt skip=1 count=2":         "it does nothing",
		"C_Encrypt  rv=1":                  `"" is none of skip,`,
		"C_Encrypt rv=1\nC_Decrypt rv=1":   `rv takes a number`,
		"C_Encipher rv=1":                  `"C_Encipher" is neither a function`,
		"Encrypt rv=1":                     `"Encrypt" is neither a function`,
		"C_GetFunctionList rv=1":           `"C_GetFunctionList" is neither a function`,
		"C_Encrypt rv=":                    `rv takes a number from 0 to 18446744073709551615, not ""`,
		"C_Encrypt rv=b3":                  `not "b3"`,
		"C_Encrypt rv=0x1_0":               `not "0x1_0"`,
		"C_Encrypt rv=0x10000000000000000": "rv takes a number",
		"C_Encrypt rv=-1":                  `not "-1"`,
		"C_Encrypt rv=1 count=0":           `count takes a number from 1 to 1000000000, not "0"`,
		"C_Encrypt rv=1 count=0x1":         `not "0x1"`,
		"C_Encrypt rv=1 skip=99999999999":  "skip takes a number",
		"C_Encrypt sleep=5":                `"sleep=5" is none of`,
		"C_Encrypt exit=256":               "exit takes a number from 0 to 255",
		"C_Encrypt exit":                   "exit takes a number",
		"C_Encrypt segv=1":                 "segv takes no number",
		"C_Encrypt rv=1 hang":              "rv=1 and hang: only one of",
		"C_Encrypt rv=1 rv=2":              "rv stands twice",
		"dead now":                         "nothing may follow dead",
		"logged-out now":                   "nothing may follow logged-out",
		"boast":                            "boast takes a number",
		"reused a b":                       "reused takes a label",
		"ill":                              "ill takes part of a label",
		"ill-wraps a b":                    "ill-wraps takes part of a label",
		"ill-opens":                        "ill-opens takes part of a label",
		"ill-code /bad/":                   "ill-code takes a number",
		"ill-sleep":                        "ill-sleep takes a number",
		"boast much":                       `boast takes a number, not "much"`,
		"slots 1 2":                        "slots takes a number",
		"iv":                               "iv takes one of written,",
		"iv backwards":                     "iv takes one of written,",
		"iv written fixed":                 "iv takes one of written,",
	} {
		err := checkRules([]string{"lossy", rule})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "rule ") {
			t.Errorf("rule %q: %v, want %q", rule, err, want)
		}
	}
	if err := checkRules(slices.Repeat([]string{"C_Sign rv=1"}, 65)); err == nil || !strings.Contains(err.Error(), "at most 64") {
		t.Errorf("65 rules: %v", err)
	}
	if err := checkRules([]string{"iv written", "iv fixed"}); err == nil || !strings.Contains(err.Error(), "only one") {
		t.Errorf("two styles: %v", err)
	}
}

// The module's list has no holes: what the ABI has can be called.
func TestFunctionsAreComplete(t *testing.T) {
	content, err := os.ReadFile("../internal/cryptoki/cryptoki.h")
	if err != nil {
		t.Fatal(err)
	}
	_, list, _ := strings.Cut(string(content), "typedef struct ck_functions {")
	list, _, _ = strings.Cut(list, "} ck_functions;")
	want := regexp.MustCompile(`C_\w+`).FindAllString(list, -1)
	want = slices.DeleteFunc(want, func(name string) bool { return name == "C_GetFunctionList" })
	got := functions()
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" || len(want) != 67 {
		t.Errorf("%d functions (-header +module):\n%s", len(want), diff)
	}
}
