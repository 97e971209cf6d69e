package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os/user"
	"slices"
	"strconv"
	"strings"
)

// Mode is the permission bits of a socket file, written in octal: "0660".
type Mode fs.FileMode

// UnmarshalText reads octal digits. Bits for everybody's writing are as good as
// others: who may connect is not who may use a key.
func (m *Mode) UnmarshalText(text []byte) error {
	bits, err := strconv.ParseUint(string(text), 8, 32)
	if err != nil || bits > uint64(fs.ModePerm) {
		return fmt.Errorf(`%s is not a file mode; write octal digits in quotes, such as "0660"`, quote(string(text)))
	}
	*m = Mode(bits)
	return nil
}

// FileMode is m for package os.
func (m Mode) FileMode() fs.FileMode { return fs.FileMode(m) }

// Size is a number of bytes, written as a plain number or with a unit: 512,
// 64KiB, 4MiB, 1TiB (powers of 1024) or 1kB, 1MB, 1GB, 1TB (powers of 1000).
type Size uint64

func sizeUnits() []struct {
	suffix string
	bytes  uint64
} {
	return []struct {
		suffix string
		bytes  uint64
	}{
		{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40}, {"PiB", 1 << 50},
		{"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"PB", 1e15}, {"B", 1},
	}
}

// UnmarshalText reads a number with or without a unit; no fractions.
func (s *Size) UnmarshalText(text []byte) error {
	number, factor := string(text), uint64(1)
	for _, unit := range sizeUnits() {
		if n, ok := strings.CutSuffix(number, unit.suffix); ok {
			number, factor = strings.TrimRight(n, " "), unit.bytes
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil || n > math.MaxUint64/factor {
		return fmt.Errorf("%s is not a size; write a whole number with a unit, such as 64KiB, 4MiB or 1TiB", quote(string(text)))
	}
	*s = Size(n * factor)
	return nil
}

// String writes the largest binary unit that leaves a whole number.
func (s Size) String() string {
	for _, unit := range []string{"PiB", "TiB", "GiB", "MiB", "KiB"} {
		for _, u := range sizeUnits() {
			if u.suffix == unit && s != 0 && uint64(s)%u.bytes == 0 {
				return strconv.FormatUint(uint64(s)/u.bytes, 10) + unit
			}
		}
	}
	return strconv.FormatUint(uint64(s), 10)
}

// UID is a user, written as a number or as a name that is looked up once, when
// the configuration is read.
type UID uint32

// UnmarshalText reads a number or looks a user up.
func (u *UID) UnmarshalText(text []byte) error {
	id, err := accountID("user", string(text), func(name string) (string, error) {
		account, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return account.Uid, nil
	})
	*u = UID(id)
	return err
}

// GID is a group, written as a number or as a name that is looked up once, when
// the configuration is read.
type GID uint32

// UnmarshalText reads a number or looks a group up.
func (g *GID) UnmarshalText(text []byte) error {
	id, err := accountID("group", string(text), func(name string) (string, error) {
		group, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return group.Gid, nil
	})
	*g = GID(id)
	return err
}

// errNoAccount is the error of a name that this host does not know.
var errNoAccount = errors.New("on this host")

// accountID turns a number or name into an ID. The largest 32-bit number means
// "no account" to the kernel and is refused.
func accountID(kind, text string, lookup func(string) (string, error)) (uint32, error) {
	number := text
	if !allDigits(text) {
		found, err := lookup(text)
		if err != nil {
			return 0, fmt.Errorf("there is no %s %s %w; create it or write its number", kind, quote(text), errNoAccount)
		}
		number = found
	}
	id, err := strconv.ParseUint(number, 10, 32)
	if err != nil || id == math.MaxUint32 {
		return 0, fmt.Errorf("%s is not a %s number; it is 0 to 4294967294", quote(text), kind)
	}
	return uint32(id), nil
}

func allDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// Settings is a JSON object for a plugin, made from any YAML mapping.
type Settings json.RawMessage

// Partition says what may share an encryption data key.
type Partition string

// The partitions: each caller has data keys of its own (the default), all
// callers of a key share them, or each encryption context has its own.
const (
	PartitionCaller  Partition = "caller"
	PartitionKey     Partition = "key"
	PartitionContext Partition = "context"
)

// UnmarshalText refuses any other word.
func (p *Partition) UnmarshalText(text []byte) error {
	return oneOf(p, string(text), PartitionCaller, PartitionKey, PartitionContext)
}

// ContextValues says what an audit record tells of an encryption context.
type ContextValues string

// The keys alone (the default), the values as HMACs, or in clear.
const (
	ContextKeys  ContextValues = "keys"
	ContextHMAC  ContextValues = "hmac"
	ContextClear ContextValues = "clear"
)

// UnmarshalText refuses any other word.
func (c *ContextValues) UnmarshalText(text []byte) error {
	return oneOf(c, string(text), ContextKeys, ContextHMAC, ContextClear)
}

// LogFormat is how log lines look.
type LogFormat string

// One JSON object per line (the default), or text for people.
const (
	LogJSON    LogFormat = "json"
	LogConsole LogFormat = "console"
)

// UnmarshalText refuses any other word.
func (f *LogFormat) UnmarshalText(text []byte) error {
	return oneOf(f, string(text), LogJSON, LogConsole)
}

// LogLevel is the least severe level that is logged, in zap's words.
type LogLevel string

// The levels; info is the default.
const (
	LogDebug LogLevel = "debug"
	LogInfo  LogLevel = "info"
	LogWarn  LogLevel = "warn"
	LogError LogLevel = "error"
)

// UnmarshalText refuses any other word.
func (l *LogLevel) UnmarshalText(text []byte) error {
	return oneOf(l, string(text), LogDebug, LogInfo, LogWarn, LogError)
}

// oneOf sets *target to text, which must be one of the allowed words.
func oneOf[T ~string](target *T, text string, allowed ...T) error {
	words := make([]string, len(allowed))
	for i, word := range allowed {
		if T(text) == word {
			*target = word
			return nil
		}
		words[i] = string(word)
	}
	return errors.New(unknownWord(text, words))
}

// maxListed bounds the known words that a message lists.
const maxListed = 20

// unknownWord says that text is none of the known words, which it lists, and
// guesses which was meant.
func unknownWord(text string, known []string) string {
	message := quote(text) + " is not known"
	if guess := nearest(text, known); guess != "" {
		message += fmt.Sprintf("; did you mean %q?", guess)
	}
	var listed []string
	for _, word := range known {
		if len(listed) == maxListed {
			break
		}
		if word != "" && !slices.Contains(listed, word) {
			listed = append(listed, word)
		}
	}
	if len(listed) > 0 {
		message += " (known: " + strings.Join(listed, ", ") + ")"
	}
	return message
}
