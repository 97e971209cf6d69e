package main

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/kms-agent/kms-agent/hsm"
)

// fault is what is wrong with the settings, or with what they name on this host.
type fault struct {
	// Setting is the setting's name, "" for the settings as a whole.
	Setting string `json:"setting,omitempty"`
	// WrappingKey is the URI that is wrong, where it is one.
	WrappingKey string `json:"wrapping_key,omitempty"`
	Message     string `json:"message"`
	// Warning: the backend starts, and does not work as long as it is so.
	Warning bool `json:"warning,omitempty"`
}

// check looks at what can be known without the vendor's library: that is not loaded,
// and no token is asked.
func (r request) check() []fault {
	s, token, err := parseSettings(r.Settings)
	faults := settingsFaults(err)
	if s.Module != "" {
		if err := moduleFault(s.Module); err != nil {
			faults = append(faults, fault{Setting: "module", Message: err.Error()})
		}
	}
	for _, uri := range r.WrappingKeys {
		u, err := keyURI(uri)
		if err == nil {
			err = otherToken(u, token)
		}
		if err != nil {
			faults = append(faults, fault{WrappingKey: uri, Message: told(err)})
		}
	}
	if err == nil && s.PINDescr == "" { // that of the agent is not here
		setting := map[bool]string{s.PINFile != "": "pin_file", s.PINCred != "": "pin_credential", s.PINVariable != "": "pin_variable"}[true]
		if err := s.pinSource().Check(); err != nil {
			faults = append(faults, fault{Setting: setting, Message: s.withPINCure(err).Error(), Warning: true})
		}
	}
	if err := s.damagedCounts(); err != nil {
		f := fault{Message: err.Error()}
		if s.StateDir != "" {
			f.Setting = "state_dir"
		}
		faults = append(faults, f)
	}
	return faults
}

// withPINCure adds to an error of the PIN's file how this user may read it.
func (s settings) withPINCure(err error) error {
	if s.PINFile == "" || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	uid := os.Geteuid()
	return fmt.Errorf("%w; this check runs as uid %d, and should as the agent's user: if that is it, chown %d %s, chmod 400 it, and let that user pass the directories above it", err, uid, uid, s.PINFile)
}

// otherToken tells why a key's URI can mean no key on the token of the settings, whatever
// that token is.
func otherToken(key, token hsm.URI) error {
	for _, part := range []struct{ name, key, token string }{
		{"token", key.Token, token.Token}, {"token with serial", key.Serial, token.Serial},
		{"token with manufacturer", key.Manufacturer, token.Manufacturer}, {"token with model", key.Model, token.Model},
	} {
		if part.key != "" && part.token != "" && part.key != part.token {
			return fmt.Errorf("names the %s %q, and the settings of its backend %q: nothing can be wrapped or opened with it", part.name, part.key, part.token)
		}
	}
	return nil
}

// damagedCounts says what is wrong with the counts of wraps, if they are there. Nothing
// is made or changed.
func (s settings) damagedCounts() error {
	dir := s.knownDirectory()
	if !filepath.IsAbs(dir) {
		return nil
	}
	_, damage := s.openCounter(dir, nil)
	return damage
}

// settingsFaults are the faults of parseSettings, by setting.
func settingsFaults(err error) []fault {
	if err == nil {
		return nil
	}
	var faults []fault
	for _, line := range strings.Split(err.Error(), "\n") {
		path, message, _ := strings.Cut(line, ": ")
		setting, _ := strings.CutPrefix(path, "settings.")
		if setting == "settings" {
			setting = ""
		}
		faults = append(faults, fault{Setting: setting, Message: message})
	}
	return faults
}

// moduleFault tells why a file cannot be a PKCS#11 module of this process.
func moduleFault(path string) error {
	if _, err := os.Stat(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s does not exist; name the vendor's PKCS#11 library", path)
		}
		return fmt.Errorf("%s cannot be looked at: %w", path, err)
	}
	own, err := elf.Open("/proc/self/exe")
	if err != nil {
		return nil // nothing is known then
	}
	defer func() { _ = own.Close() }()
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("%s is no shared library", path)
	}
	defer func() { _ = f.Close() }()
	if f.Machine != own.Machine || f.Class != own.Class {
		return fmt.Errorf("%s is for another kind of machine: %v %v, and this one is %v %v", path, f.Machine, f.Class, own.Machine, own.Class)
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return fmt.Errorf("%s exports nothing, so it is no PKCS#11 module", path)
	}
	for _, s := range symbols {
		if s.Name == "C_GetFunctionList" && s.Section != elf.SHN_UNDEF {
			return nil
		}
	}
	return fmt.Errorf("%s exports no C_GetFunctionList, so it is no PKCS#11 module", path)
}

// unloaded is why a module was not loaded: what its file says, where that says it, and
// else err, the loader's word.
func (s settings) unloaded(err error) error {
	if fault := moduleFault(s.Module); fault != nil {
		return fmt.Errorf("settings.module: %w", fault)
	}
	return err
}

// unreadable says what is wrong with settings that are not read at all.
func unreadable(raw json.RawMessage, err error) error {
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		name = strings.Trim(name, `"`)
		if strings.EqualFold(name, "pin") {
			return fmt.Errorf("settings.%s: the PIN itself does not belong into the configuration: write it into a file of its own, and that file's path into pin_file; or use pin_credential, pin_descriptor or pin_variable", name)
		}
		return fmt.Errorf("settings.%s: there is no such setting; docs/hsm.md has those that are", name)
	}
	if e := (*json.UnmarshalTypeError)(nil); errors.As(err, &e) && e.Field != "" {
		return fmt.Errorf("settings.%s: must be of type %v, not %s", e.Field, e.Type, e.Value)
	}
	if len(bytes.TrimSpace(raw)) == 0 {
		return errors.New("settings: are missing; docs/hsm.md has those that are needed")
	}
	return fmt.Errorf("settings: %w", err)
}
