package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

// settings are the backend's settings in the agent's configuration.
type settings struct {
	Module       string   `json:"module"`
	ModuleConfig string   `json:"module_config"`
	Token        string   `json:"token"`
	PINFile      string   `json:"pin_file"`
	PINCred      string   `json:"pin_credential"`
	PINVariable  string   `json:"pin_variable"`
	PINDescr     string   `json:"pin_descriptor"`
	Sessions     int      `json:"sessions"`
	HangAfter    duration `json:"hang_after"`
	FleetSize    uint64   `json:"fleet_size"`
	Catalogue    string   `json:"catalogue_file"`
	CatalogueKey string   `json:"catalogue_key_file"`
	StateDir     string   `json:"state_dir"`

	retryPIN bool
}

// duration is a time.Duration as text, such as "10s".
type duration time.Duration

// notDuration is what a duration is that cannot be read: the other faults are told
// with it.
const notDuration duration = -1

// UnmarshalJSON reads "10s".
//
//nolint:unparam // the interface of package json has the error
func (d *duration) UnmarshalJSON(b []byte) error {
	*d = notDuration
	var text string
	if err := json.Unmarshal(b, &text); err == nil {
		if parsed, err := time.ParseDuration(text); err == nil && parsed >= 0 {
			*d = duration(parsed)
		}
	}
	return nil
}

// pinFaults tells what is wrong with where the PIN is.
func (s settings) pinFaults(fault func(format string, a ...any)) {
	given := 0
	for _, source := range []string{s.PINFile, s.PINCred, s.PINVariable, s.PINDescr} {
		if source != "" {
			given++
		}
	}
	if given != 1 {
		fault("pin_file: exactly one of pin_file, pin_credential, pin_descriptor and pin_variable says where the PIN is")
	}
	if s.PINFile != "" && !filepath.IsAbs(s.PINFile) {
		fault("pin_file: must be an absolute path")
	}
}

// maxFleet is how many hosts may share the keys of a token.
const maxFleet = 1_000_000

// parseSettings reads settings strictly and reports every fault at once.
func parseSettings(raw json.RawMessage) (settings, hsm.URI, error) {
	s := settings{FleetSize: 1}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return s, hsm.URI{}, unreadable(raw, err)
	}
	var errs []error
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf("settings."+format, a...)) }
	if !filepath.IsAbs(s.Module) {
		fault("module: the absolute path of the vendor's PKCS#11 library is required")
	}
	token, err := hsm.ParseURI(s.Token)
	switch {
	case s.Token == "":
		fault("token: a PKCS#11 URI that selects the token is required, such as pkcs11:token=kms")
	case !strings.HasPrefix(s.Token, "pkcs11:"):
		fault("token: %.64q is no PKCS#11 URI, such as pkcs11:token=kms", s.Token)
	case err != nil:
		fault("token: %w", err)
	case token.Object != "" || token.ID != nil || token.Type != "":
		fault("token: %s selects the token; what names a key, object=, stands in wrapping_key of a key", s.Token)
	case token.Token+token.Manufacturer+token.Model+token.Serial == "" && token.Slot == nil:
		fault("token: %s selects any token; name the one that is meant, as in pkcs11:token=kms", s.Token)
	}
	s.pinFaults(fault)
	if s.Sessions < 0 || s.Sessions > 1024 {
		fault("sessions: 1 to 1024, or 0 for the default")
	}
	if s.HangAfter == notDuration {
		fault(`hang_after: a duration in quotes, such as "10s"`)
	} else if d := time.Duration(s.HangAfter); d != 0 && (d < 100*time.Millisecond || d > 10*time.Minute) {
		fault("hang_after: 100ms to 10m")
	}
	if s.FleetSize < 1 || s.FleetSize > maxFleet {
		fault("fleet_size: 1 to %d; it is 1 where it is left out", maxFleet)
	}
	if s.Catalogue != "" || s.CatalogueKey != "" {
		if !filepath.IsAbs(s.Catalogue) || !filepath.IsAbs(s.CatalogueKey) || s.Catalogue == s.CatalogueKey {
			fault("catalogue_file and catalogue_key_file: both must be named, as absolute paths, where the catalogue is not on the token")
		}
	}
	if s.StateDir != "" && !filepath.IsAbs(s.StateDir) {
		fault("state_dir: must be an absolute path")
	}
	return s, token, errors.Join(errs...)
}
