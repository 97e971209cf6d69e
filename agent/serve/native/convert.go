package native

import (
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kms-agent/kms-agent/agent/kms"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/envelope"
)

// keyUse translates which key was used. The freshness sources have the same
// names on both sides: the wire's enumeration counts them from one.
func keyUse(u kms.KeyUse) *kmsagentv1.KeyUse {
	f := &kmsagentv1.Freshness{}
	switch u.Freshness.Source.String() {
	case "upstream":
		f.Source = kmsagentv1.Freshness_SOURCE_UPSTREAM
	case "cached":
		f.Source = kmsagentv1.Freshness_SOURCE_CACHED
		f.Age = durationpb.New(u.Freshness.Age)
	case "grace":
		f.Source = kmsagentv1.Freshness_SOURCE_GRACE
		f.Age, f.GraceLeft = durationpb.New(u.Freshness.Age), durationpb.New(u.Freshness.GraceLeft)
	}
	return &kmsagentv1.KeyUse{Key: u.Key, KeyVersion: u.Version, Freshness: f}
}

// edkMessage is one message for all EDKs of a key.
func edkMessage(edks []envelope.EDK) *kmsagentv1.EncryptedDataKey {
	var m *kmsagentv1.EncryptedDataKey
	for i, e := range edks {
		one := &kmsagentv1.EncryptedDataKey{ProviderId: e.ProviderID, ProviderInfo: e.ProviderInfo, Ciphertext: e.Ciphertext}
		if i == 0 {
			m = one
			continue
		}
		m.More = append(m.More, one)
	}
	return m
}

// EDKs returns all EDKs of a message.
func EDKs(m *kmsagentv1.EncryptedDataKey) []envelope.EDK {
	edks := make([]envelope.EDK, 0, 1+len(m.GetMore()))
	for _, one := range append([]*kmsagentv1.EncryptedDataKey{m}, m.GetMore()...) {
		edks = append(edks, envelope.EDK{ProviderID: one.GetProviderId(), ProviderInfo: one.GetProviderInfo(), Ciphertext: one.GetCiphertext()})
	}
	return edks
}

func keyMessage(d kms.KeyDescription) *kmsagentv1.Key {
	k := &kmsagentv1.Key{
		Name: d.Name, Labels: d.Labels, FormerNames: d.FormerNames, CurrentVersion: d.CurrentVersion,
		BindContext: d.BindContext, MaxAge: durationpb.New(d.MaxAge),
	}
	for _, op := range d.Operations {
		k.Operations = append(k.Operations, string(op))
	}
	for _, v := range d.Versions {
		version := &kmsagentv1.KeyVersion{Version: v.Version}
		switch v.State.String() {
		case "enabled":
			version.State = kmsagentv1.KeyVersion_STATE_ENABLED
		case "disabled":
			version.State = kmsagentv1.KeyVersion_STATE_DISABLED
		case "destroyed":
			version.State = kmsagentv1.KeyVersion_STATE_DESTROYED
		}
		if !v.Created.IsZero() {
			version.Created = timestamppb.New(v.Created)
		}
		k.Versions = append(k.Versions, version)
	}
	return k
}
