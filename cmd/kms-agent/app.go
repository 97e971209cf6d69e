package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// app is what every command shares: the three streams, the environment and the
// form of the output.
type app struct {
	in, out, errOut *os.File
	env             func(string) string
	format          outputFormat
	// workloadAPI is the address that the command uses, once that is known.
	workloadAPI string
}

func newApp(in, out, errOut *os.File, env func(string) string) *app {
	return &app{in: in, out: out, errOut: errOut, env: env, format: formatTable}
}

func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// colours says whether f takes escape sequences (https://no-color.org).
func (a *app) colours(f *os.File) bool {
	return isTerminal(f) && a.env("NO_COLOR") == "" && a.env("TERM") != "dumb"
}

// outputFormat is the value of --output.
type outputFormat string

const (
	formatTable outputFormat = "table"
	formatJSON  outputFormat = "json"
)

// String, Set and Type make outputFormat a flag.
func (f *outputFormat) String() string { return string(*f) }

// Type names the flag's values in the help.
func (f *outputFormat) Type() string { return "table|json" }

// Set refuses any other word.
func (f *outputFormat) Set(text string) error {
	if text != string(formatTable) && text != string(formatJSON) {
		return errors.New("must be table or json")
	}
	*f = outputFormat(text)
	return nil
}

// outputFlag gives a command --output.
func (a *app) outputFlag(c *cobra.Command) {
	c.Flags().Var(&a.format, "output", "how to print: table or json")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
}

// print writes value as JSON, or the table that rows makes of it.
func (a *app) print(value any, rows func(*table)) error {
	if a.format == formatJSON {
		return a.printJSON(value)
	}
	t := &table{}
	rows(t)
	_, err := io.WriteString(a.out, t.render(a.colours(a.out)))
	return err
}

// printJSON writes indented JSON. Messages of the API keep the field names of
// their .proto file.
func (a *app) printJSON(value any) error {
	if message, ok := value.(proto.Message); ok {
		encoded, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(message)
		if err != nil {
			return fmt.Errorf("print JSON: %w", err)
		}
		value = json.RawMessage(encoded)
	}
	encoder := json.NewEncoder(a.out)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	return encoder.Encode(value)
}

// note tells the user something on standard error.
func (a *app) note(format string, args ...any) {
	_, _ = fmt.Fprintf(a.errOut, "kms-agent: "+format+"\n", args...)
}

// table is text in columns.
type table struct {
	rows [][]string
	// titled is set when the first row is a header.
	titled bool
}

func (t *table) header(cells ...string) {
	t.rows, t.titled = append(t.rows, cells), true
}

func (t *table) row(cells ...string) {
	for i, cell := range cells {
		cells[i] = printable(cell)
	}
	t.rows = append(t.rows, cells)
}

// render aligns the columns. Colours never change the widths.
func (t *table) render(colours bool) string {
	var widths []int
	for _, row := range t.rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for n, row := range t.rows {
		var line strings.Builder
		for i, cell := range row {
			if state, rest, ok := strings.Cut(cell, " "); ok && !t.titled && i == 1 { // "up (process 7 since ...)"
				line.WriteString(paint(state, colours, false) + " " + rest)
			} else {
				line.WriteString(paint(cell, colours, n == 0 && t.titled))
			}
			line.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2))
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	return b.String()
}

// paint colours the words that tell a state.
func paint(cell string, colours, header bool) string {
	code := ""
	switch {
	case !colours:
	case header:
		code = "1"
	case cell == "serving" || cell == "up" || cell == "ready" || cell == "enabled" || cell == "ok":
		code = "32"
	case cell == "degraded" || cell == "starting" || cell == "stale" || cell == "disabled" || cell == "lacking":
		code = "33"
	case cell == "not-serving" || cell == "down" || cell == "expired" || cell == "destroyed":
		code = "31"
	}
	if code == "" {
		return cell
	}
	return "\x1b[" + code + "m" + cell + "\x1b[0m"
}

// printable keeps what others wrote from steering the terminal.
func printable(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }) {
		return fmt.Sprintf("%+q", text)
	}
	return text
}

// orDash keeps empty cells visible.
func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

// when writes a time for a table.
func when(t time.Time) string {
	if t.IsZero() || t.Unix() == 0 {
		return "-"
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}
