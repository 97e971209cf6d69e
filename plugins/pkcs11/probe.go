package main

import "github.com/kms-agent/kms-agent/hsm"

// probe is what a token can do, as it is told.
type probe struct {
	Module       string  `json:"module"`
	Library      string  `json:"library"`
	Manufacturer string  `json:"manufacturer"`
	Cryptoki     string  `json:"cryptoki"`
	Token        string  `json:"token"`
	Model        string  `json:"model"`
	Serial       string  `json:"serial"`
	Firmware     string  `json:"firmware"`
	Slot         uint    `json:"slot"`
	Sessions     int     `json:"sessions"`
	MaxSessions  uint    `json:"max_sessions,omitempty"`
	Mechanisms   int     `json:"mechanisms"`
	Suites       []trial `json:"suites"`
	// Use is the suite that new keys get, and Why says why.
	Use string `json:"use,omitempty"`
	Why string `json:"why,omitempty"`
	// Random is what random.backend could use.
	Random source `json:"random"`
}

type source struct {
	Works  bool   `json:"works"`
	Reason string `json:"reason,omitempty"`
}

type trial struct {
	Suite string `json:"suite"`
	// Mechanisms are those of the token that the suite uses.
	Mechanisms []string `json:"mechanisms"`

	Works  bool   `json:"works"`
	IV     string `json:"iv,omitempty"`
	PairUS int64  `json:"pair_us,omitempty"`
	// RSABits, Signs and OnToken are those of hsm.Trial.
	RSABits int    `json:"rsa_bits,omitempty"`
	Signs   bool   `json:"signs,omitempty"`
	OnToken bool   `json:"on_token,omitempty"`
	Reason  string `json:"reason,omitempty"`
}

func probed(p hsm.Probe) *probe {
	out := &probe{
		Module: p.Module, Library: p.Library, Manufacturer: p.Manufacturer, Cryptoki: p.Cryptoki, Token: p.Token.Label,
		Model: p.Token.Model, Serial: p.Token.Serial, Firmware: p.Token.Firmware, Slot: p.Token.Slot, Sessions: p.Sessions,
		MaxSessions: p.MaxSessions, Mechanisms: p.Mechanisms,
	}
	if p.Use != 0 {
		out.Use, out.Why = p.Use.String(), suites()[p.Use].why
	}
	if out.Random.Works = p.Random == nil; p.Random != nil {
		out.Random.Reason = told(p.Random)
	}
	for _, s := range p.Trials {
		t := trial{
			Suite: s.Suite.String(), Mechanisms: suites()[s.Suite].mechanisms, Works: s.Err == nil, IV: s.IV, PairUS: s.Pair.Microseconds(),
			RSABits: s.RSABits, Signs: s.Signs, OnToken: s.OnToken,
		}
		if s.Err != nil {
			t.Reason = told(s.Err)
		}
		out.Suites = append(out.Suites, t)
	}
	return out
}

// suites says of each suite what it uses of the token, and why new keys get it where
// nothing before it works.
func suites() map[hsm.Suite]struct {
	mechanisms []string
	why        string
} {
	return map[hsm.Suite]struct {
		mechanisms []string
		why        string
	}{
		hsm.GCM: {[]string{"CKM_AES_GCM"}, "it encrypts and authenticates in one operation of the token; a version makes 2^32 wraps in all"},
		hsm.KWP: {[]string{"CKM_AES_KEY_WRAP_KWP"}, "aes-gcm does not work here; it authenticates in one operation of the token"},
		hsm.CBCHMAC: {[]string{"CKM_AES_CBC", "CKM_SHA256_HMAC"},
			"aes-gcm and aes-kwp do not work here; it takes two operations of the token and two keys"},
		hsm.OAEP:     {[]string{"CKM_RSA_PKCS_OAEP with SHA-256"}, "nothing else works here; it is slow, and whoever has the public key can wrap"},
		hsm.OAEPSHA1: {[]string{"CKM_RSA_PKCS_OAEP with SHA-1"}, ""},
	}
}
