package hsmtest

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// maxRules is MAX_RULES of module/rules.c.
const maxRules = 64

// checkRules finds what the module would not understand, or what would do nothing:
// a test must not pass because a fault did not happen.
func checkRules(rules []string) error {
	if len(rules) > maxRules {
		return fmt.Errorf("%d rules, at most %d are possible", len(rules), maxRules)
	}
	styles := 0
	for _, rule := range rules {
		if err := checkRule(rule); err != nil {
			return fmt.Errorf("rule %q: %w", rule, err)
		}
		if strings.HasPrefix(rule, "iv ") {
			styles++
		}
	}
	if styles > 1 {
		return errors.New("several rules for iv, only one is possible")
	}
	return nil
}

func checkRule(rule string) error {
	words := strings.Split(rule, " ")
	switch words[0] {
	case "dead", "no-slots", "lossy", "logged-out":
		if len(words) > 1 {
			return fmt.Errorf("nothing may follow %s", words[0])
		}
		return nil
	case "boast", "slots", "ill-code", "ill-sleep":
		if len(words) != 2 {
			return fmt.Errorf("%s takes a number", words[0])
		}
		if _, err := parse(words[1], true); err != nil {
			return fmt.Errorf("%s takes a number, not %q", words[0], words[1])
		}
		return nil
	case "iv":
		styles := []string{"written", "appended-12", "appended-16", "prepended-12", "fixed", "stuck", "short-tag"}
		if len(words) != 2 || !slices.Contains(styles, words[1]) {
			return fmt.Errorf("iv takes one of %s", strings.Join(styles, ", "))
		}
		return nil
	case "reused":
		if len(words) != 2 {
			return errors.New("reused takes a label")
		}
		return nil
	case "ill", "ill-wraps", "ill-opens":
		if len(words) != 2 {
			return fmt.Errorf("%s takes part of a label", words[0])
		}
		return nil
	case "*":
	default:
		if !slices.Contains(functions(), words[0]) {
			return fmt.Errorf("%q is neither a function that can be told what to do, nor *, dead, no-slots, lossy, logged-out, boast, slots, iv, reused, ill, ill-wraps, ill-opens, ill-code or ill-sleep", words[0])
		}
	}
	return checkWords(words[1:])
}

// checkWords checks what follows a function.
func checkWords(words []string) error {
	seen := map[string]bool{}
	var ends []string
	for _, word := range words {
		name, _, _ := strings.Cut(word, "=")
		if seen[name] {
			return fmt.Errorf("%s stands twice", name)
		}
		seen[name] = true
		if err := checkWord(word); err != nil {
			return err
		}
		if !slices.Contains([]string{"skip", "count", "sleep_ms"}, name) {
			ends = append(ends, word)
		}
	}
	if len(ends) > 1 {
		return fmt.Errorf("%s: only one of rv, segv, abort, exit and hang is possible", strings.Join(ends, " and "))
	}
	if len(ends) == 0 && !seen["sleep_ms"] {
		return errors.New("it does nothing: sleep_ms, rv, segv, abort, exit or hang is missing")
	}
	return nil
}

func checkWord(word string) error {
	name, number, has := strings.Cut(word, "=")
	var lowest, highest uint64
	switch name {
	case "segv", "abort", "hang":
		if has {
			return fmt.Errorf("%s takes no number", name)
		}
		return nil
	case "skip", "count", "sleep_ms":
		lowest, highest = 1, 1_000_000_000
	case "exit":
		highest = 255
	case "rv":
		highest = 1<<64 - 1
	default:
		return fmt.Errorf("%q is none of skip, count, sleep_ms, rv, segv, abort, exit and hang", word)
	}
	n, err := parse(number, name == "rv")
	if err != nil || n < lowest || n > highest {
		return fmt.Errorf("%s takes a number from %d to %d, not %q", name, lowest, highest, number)
	}
	return nil
}

// parse takes what number in module/rules.c takes.
func parse(number string, code bool) (uint64, error) {
	if hex, ok := strings.CutPrefix(number, "0x"); ok && code {
		return strconv.ParseUint(hex, 16, 64)
	}
	return strconv.ParseUint(number, 10, 64)
}

// functions returns what the module has in its list, as the source says.
func functions() []string {
	var names []string
	for _, set := range regexp.MustCompile(`SET\(([A-Z]\w+)\)`).FindAllStringSubmatch(faultSource, -1) {
		names = append(names, "C_"+set[1])
	}
	return names
}
