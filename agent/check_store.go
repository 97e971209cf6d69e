package agent

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// store warns of a store that protects nothing, or that serves nobody.
func (h *hostCheck) store() {
	if h.cfg.Store.Sealer == SealerFile {
		h.warn("store.sealer", developmentWarning)
	}
	stores := func(k KeyConfig) bool { return k.Cache.Store }
	if h.cfg.Store.Sealer != "" && !slices.ContainsFunc(h.cfg.Keys, stores) {
		h.warn("store", "no key has cache.store, so that nothing is stored; set it on keys that an agent is to serve that starts in an outage")
	}
	for i, k := range h.cfg.Keys {
		if stores(k) && k.Grace == (GraceConfig{}) {
			h.warn(fmt.Sprintf("keys[%d].cache.store", i), "without grace what is stored serves for max_age at most after a restart in an outage; set the key's grace")
		}
	}
}

// sealer tests that what the store is to be sealed with can be used.
func (h *hostCheck) sealer() {
	switch h.cfg.Store.Sealer {
	case SealerKeyring:
		if _, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_USER_KEYRING, true); err != nil {
			h.fault("store.sealer", "the kernel's keyring cannot be used (%v): a container's seccomp profile must allow add_key and keyctl; or use the sealer tpm, or no store", err)
		}
	case SealerTPM:
		if device := h.cfg.Store.TPM.Device; !permitted(device, unix.R_OK|unix.W_OK) {
			h.fault("store.tpm.device", "uid %d cannot use the TPM at %s: turn it on in the firmware, and give the agent the group tss; or use the sealer keyring", unix.Geteuid(), device)
		}
	case SealerFile:
	}
}
