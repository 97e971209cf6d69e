package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/kms-agent/kms-agent/cache/seal/tpm"
)

// StoreConfig says where data keys outlive the process: those of keys with
// KeyCacheConfig.Store.
type StoreConfig struct {
	// Sealer keeps the secret that the store is sealed with; empty: there is no store.
	Sealer Sealer    `yaml:"sealer"`
	TPM    TPMConfig `yaml:"tpm"`
}

// TPMConfig says which TPM.
type TPMConfig struct {
	// Device is a device file, or the Unix socket of a TPM in software.
	Device string `yaml:"device"`
	// Index is the NV index of the counter.
	Index NVIndex `yaml:"index"`
}

// Sealer says what a sealed store is sealed with.
type Sealer string

// The sealers: the kernel's keyring, which lasts until the next boot; a TPM 2.0; and for
// development a file.
const (
	SealerKeyring Sealer = "keyring"
	SealerTPM     Sealer = "tpm"
	SealerFile    Sealer = "file"
)

// UnmarshalText refuses any other word.
func (s *Sealer) UnmarshalText(text []byte) error {
	return oneOf(s, string(text), SealerKeyring, SealerTPM, SealerFile)
}

// NVIndex is an index of a TPM's memory, written as 0x01804b41 or in decimal.
type NVIndex uint32

// UnmarshalText reads a number.
func (n *NVIndex) UnmarshalText(text []byte) error {
	number, err := strconv.ParseUint(string(text), 0, 32)
	if err != nil {
		return fmt.Errorf("%s is not an NV index, such as %v", quote(string(text)), NVIndex(tpm.DefaultIndex))
	}
	*n = NVIndex(number)
	return nil
}

// String writes it as people write such indexes.
func (n NVIndex) String() string { return fmt.Sprintf("%#08x", uint32(n)) }

func (l *loader) validateStore() {
	c := l.cfg.Store
	switch {
	case c.Sealer == "" && l.main.has("store"):
		l.report("store.sealer", "is missing; write keyring, tpm or, for development, file")
	case c.Sealer != SealerTPM && l.main.has("store.tpm"):
		l.report("store.tpm", "is for the sealer tpm, and this is %s; leave it out, or change the sealer", c.Sealer)
	case c.Sealer == SealerTPM && (c.TPM.Index < tpm.FirstIndex || c.TPM.Index > tpm.LastIndex):
		l.report("store.tpm.index", "must be from %v to %v: those are the owner's", NVIndex(tpm.FirstIndex), NVIndex(tpm.LastIndex))
	}
	for i, k := range l.cfg.Keys {
		if k.Cache.Store && c.Sealer == "" {
			l.report(fmt.Sprintf("keys[%d].cache.store", i), "needs a store; write store: { sealer: keyring } at the top, or leave this out")
		}
	}
}

// upstreamID identifies the keys that a backend reaches, whatever its name and limits:
// data keys that were stored under another are not taken in.
func (b *BackendConfig) upstreamID() string {
	text, err := json.Marshal([]any{b.Plugin, b.Path, b.Args, b.Env, b.EnvFromFiles, json.RawMessage(b.Settings)})
	if err != nil {
		return "" // settings are JSON
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}
