package main

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
)

// hint says what to do about what the plugin answered to r, "" if the answer says that
// itself. Commands in it are those that can be run as they stand.
func (f *hsmFlags) hint(c *cobra.Command, r hsmRequest, answer string) string {
	pin := "settings.pin_file of the backend"
	if f.module != "" {
		pin = "--pin-file"
	}
	retry := sameToken(c, "probe --retry-pin") + " tries this PIN again: make sure first that it is right"
	for _, known := range []struct{ said, hint string }{
		{"'kms-agent hsm probe --retry-pin'", retry},
		{"the token refuses the PIN", "put the right PIN in its place; or, if it is right by now, " + sameToken(c, "probe --retry-pin")},
		{"the PIN: open ", "write the PIN into that file, for this user alone to read, or name the one that has it: " + pin},
		{"'kms-agent hsm init-key'", sameToken(c, "init-key "+r.Key) + " makes it"},
		{"the token cannot do this suite", sameToken(c, "probe") + " lists the suites that work"},
		{"the token can do none of the suites", sameToken(c, "probe") + " tells of each suite why"},
		{"repeat this with --confirm", fmt.Sprintf("%s makes another; or, to encrypt nothing any more, repeat the command with --confirm %s@%d", sameToken(c, "rotate "+r.Key), r.Key, r.Version)},
		{"disable it first", sameToken(c, fmt.Sprintf("disable %s %d", r.Key, r.Version)) + " does that"},
		{" is destroyed", "that is final: no command brings the version back, and only a backup of the HSM has its key"},
		{"cannot open shared object file", "ldd, with the path of the module, lists which of the libraries that it needs is missing"},
	} {
		if strings.Contains(answer, known.said) {
			return known.hint
		}
	}
	return ""
}

// plainWord is what a shell takes as it is.
var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// sameToken is a command of kms-agent hsm with those flags of c that say which token is
// meant and how to reach it, for a shell.
func sameToken(c *cobra.Command, command string) string {
	words := []string{"kms-agent hsm", command}
	for _, name := range []string{"config", "backend", "module", "module-config", "token", "pin-file", "pin-fd", "state-dir", "plugin"} {
		given := c.Flags().Lookup(name)
		if !given.Changed {
			continue
		}
		value := given.Value.String()
		if !plainWord.MatchString(value) {
			value = "'" + strings.ReplaceAll(value, "'", `'\''`) + "'"
		}
		words = append(words, "--"+name, value)
	}
	return strings.Join(words, " ")
}
