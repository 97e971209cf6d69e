package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/census"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
)

// KeyUse names the key behind an answer and how fresh it is.
type KeyUse struct {
	Key       string
	Version   string
	Freshness cache.Freshness
}

// EncryptRequest asks for a message.
type EncryptRequest struct {
	Key       string
	Plaintext []byte
	Context   map[string]string
}

// EncryptResponse holds a message.
type EncryptResponse struct {
	Message []byte
	KeyUse  KeyUse
}

// Encrypt seals plaintext into a message under a data key of req.Key. The
// plaintext is read during the call only.
func (s *Service) Encrypt(ctx context.Context, call Call, req EncryptRequest) (EncryptResponse, error) {
	return perform(ctx, s, call, policy.Encrypt, func(ctx context.Context, t *transaction) (EncryptResponse, error) {
		k, err := t.authoriseWith(ctx, req.Key, policy.Encrypt, req.Context, uint64(len(req.Plaintext)))
		if err != nil {
			return EncryptResponse{}, err
		}
		return t.seal(ctx, k, req.Plaintext, req.Context)
	})
}

// seal makes a message for a caller who may.
func (t *transaction) seal(ctx context.Context, k *key, plaintext []byte, encryptionContext map[string]string) (EncryptResponse, error) {
	t.record.BytesIn = uint64(len(plaintext))
	use, err := t.encryptionKey(ctx, k, encryptionContext, uint64(len(plaintext)), false)
	if err != nil {
		return EncryptResponse{}, err
	}
	defer use.Release()
	origin, _ := use.Origin().(*made)
	message, err := envelope.Seal(nil, use.DataKey(), origin.edks, encryptionContext, plaintext)
	if err != nil {
		return EncryptResponse{}, &Error{Reason: ReasonInternal, Key: k.Name, Message: "the message could not be made", Cause: err}
	}
	t.record.MessageID = messageID(envelope.MessageIDOf(message))
	t.record.BytesOut = uint64(len(message))
	t.service.census.Add(census.Kind{Key: k.Name, Purpose: census.Message, Wraps: origin.wraps})
	return EncryptResponse{Message: message, KeyUse: t.used(k, origin.version, use.Freshness())}, nil
}

// DecryptRequest asks for the plaintext of a message.
type DecryptRequest struct {
	Message []byte
	// ExpectedContext must all be present in the message's context.
	ExpectedContext map[string]string
}

// DecryptResponse holds the plaintext and what the message says of itself.
type DecryptResponse struct {
	Plaintext []byte
	KeyUse    KeyUse
	Context   map[string]string
}

func (r *DecryptResponse) wipe() { clear(r.Plaintext) }

// Decrypt opens a message. The key is read from the message and authorised
// before anything is unwrapped.
func (s *Service) Decrypt(ctx context.Context, call Call, req DecryptRequest) (DecryptResponse, error) {
	return perform(ctx, s, call, policy.Decrypt, func(ctx context.Context, t *transaction) (DecryptResponse, error) {
		return t.open(ctx, req)
	})
}

func (t *transaction) open(ctx context.Context, req DecryptRequest) (DecryptResponse, error) {
	t.record.BytesIn = uint64(len(req.Message))
	message, err := envelope.Parse(req.Message)
	if err != nil {
		return DecryptResponse{}, foreign(err)
	}
	k, edks, err := t.admit(ctx, &message.Header, req.ExpectedContext, uint64(message.PlaintextSize()))
	if err != nil {
		return DecryptResponse{}, err
	}
	var plaintext []byte
	use, v, err := t.unlock(ctx, k, edks, func(dataKey []byte) error {
		plaintext, err = message.Open(nil, dataKey)
		return err
	})
	if err != nil {
		return DecryptResponse{}, err
	}
	defer use.Release()
	t.record.BytesOut = uint64(len(plaintext))
	return DecryptResponse{
		Plaintext: plaintext, Context: message.Context, KeyUse: t.used(k, v.String(), use.Freshness()),
	}, nil
}

// admit finds the one logical key of a message, authorises the caller for it,
// and returns the EDKs that can be tried. Nothing has been unwrapped yet, and
// the header is not proven yet: the context decides who may try, the message's
// own tag then proves the context.
func (t *transaction) admit(ctx context.Context, h *envelope.Header, expected map[string]string, payload uint64) (*key, sealedKey, error) {
	t.record.MessageID = messageID(h.MessageID)
	name, infos, err := t.keyOf(h)
	if err != nil {
		return nil, nil, err
	}
	k, err := t.authorise(ctx, name, policy.Decrypt, h.Context, payload)
	if err != nil {
		return nil, nil, err
	}
	for pair, want := range expected {
		if got, ok := h.Context[pair]; !ok || got != want {
			return nil, nil, undecryptable(k.Name, fmt.Errorf("expected context: %q is not as expected", pair))
		}
	}
	edks, err := t.recogniseAll(k, h.EDKs, infos, h.Context, envelope.PurposeMessage, envelope.PurposeExported)
	return k, edks, err
}

// keyOf reads the logical key of a message from its EDKs. All that the caller
// may decrypt with must name the same one.
func (t *transaction) keyOf(h *envelope.Header) (string, []*envelope.ProviderInfo, error) {
	infos := make([]*envelope.ProviderInfo, len(h.EDKs))
	var names []string
	for i, edk := range h.EDKs {
		if edk.ProviderID != envelope.ProviderID {
			continue
		}
		info, err := envelope.ParseProviderInfo(edk.ProviderInfo)
		if err != nil {
			return "", nil, foreign(err)
		}
		infos[i] = &info
		if !slices.Contains(names, info.Key) {
			names = append(names, info.Key)
		}
	}
	if len(names) == 0 {
		return "", nil, foreign(errors.New("none of its encrypted data keys was made by a kms-agent"))
	}
	name, err := t.oneOf(names, h.Context)
	return name, infos, err
}

// oneOf picks the name of the key that the caller may decrypt with. Keys that
// it may not are passed over like those that nobody knows, so that nobody learns
// from a message of their own making which names there are.
func (t *transaction) oneOf(names []string, encryptionContext map[string]string) (string, error) {
	if len(names) == 1 {
		return names[0], nil
	}
	name := ""
	for _, candidate := range names {
		k, decision := t.find(candidate, policy.Decrypt, encryptionContext)
		switch {
		case k == nil || !decision.Allowed || k.Name == name:
		case name == "":
			name = k.Name
		default:
			return "", foreign(fmt.Errorf("its encrypted data keys name several keys (%q and %q)", name, k.Name))
		}
	}
	if name == "" {
		return names[0], nil
	}
	return name, nil
}

// unlock opens a message with the data key behind its EDKs. As a rule they are all of
// one data key, and whichever backend answers first opens it; where somebody has put
// together what does not belong together, each is tried by itself. The returned use is
// the caller's to release.
func (t *transaction) unlock(ctx context.Context, k *key, edks sealedKey, open func(dataKey []byte) error) (*cache.Use, versions, error) {
	tries := make([]sealedKey, 0, len(edks)+1)
	if one := distinct(edks); len(one) > 1 {
		tries = append(tries, one)
	}
	for _, edk := range edks {
		tries = append(tries, sealedKey{edk})
	}
	var first error
	for i, try := range tries {
		use, v, err := t.decryptionKey(ctx, k, try)
		if err == nil {
			if err = open(use.DataKey()); err == nil {
				use.Proven()
				return use, v, nil
			}
			t.service.cache.Doubt(use)
			use.Release()
			err = undecryptable(k.Name, err)
		}
		if first == nil || ReasonOf(first) == ReasonDecryptFailed {
			first = err
		}
		if i == 0 && len(try) > 1 && ReasonOf(err) != ReasonDecryptFailed {
			break // what none of them opens now, none opens alone
		}
	}
	return nil, nil, first
}

// distinct returns the first EDK of each part, in the order of the parts.
func distinct(edks sealedKey) sealedKey {
	var out sealedKey
	for _, edk := range edks {
		if out.of(edk.part) == nil {
			out = append(out, edk)
		}
	}
	return inOrder(out)
}

// ReEncryptRequest asks for a new message with the plaintext of another.
type ReEncryptRequest struct {
	Message         []byte
	ExpectedContext map[string]string
	// DestinationKey is empty to stay with the message's key.
	DestinationKey string
	// DestinationContext replaces the context where ReplaceContext is set.
	DestinationContext map[string]string
	ReplaceContext     bool
}

// ReEncryptResponse holds the new message.
type ReEncryptResponse struct {
	Message     []byte
	Source      KeyUse
	Destination KeyUse
}

// ReEncrypt opens a message and seals its plaintext into a new one. It needs
// decrypt on the source and encrypt on the destination; the plaintext does not
// leave the agent. One audit record names both keys.
func (s *Service) ReEncrypt(ctx context.Context, call Call, req ReEncryptRequest) (ReEncryptResponse, error) {
	return perform(ctx, s, call, opReEncrypt, func(ctx context.Context, t *transaction) (ReEncryptResponse, error) {
		opened, err := t.open(ctx, DecryptRequest{Message: req.Message, ExpectedContext: req.ExpectedContext})
		t.toDestination(req.DestinationKey)
		if err != nil {
			return ReEncryptResponse{}, err
		}
		defer opened.wipe()
		name, encryptionContext := opened.KeyUse.Key, opened.Context
		if req.DestinationKey != "" {
			name = req.DestinationKey
		}
		if req.ReplaceContext {
			encryptionContext = req.DestinationContext
		}
		k, err := t.authoriseWith(ctx, name, policy.Encrypt, encryptionContext, uint64(len(opened.Plaintext)))
		if err != nil {
			return ReEncryptResponse{}, err
		}
		made, err := t.seal(ctx, k, opened.Plaintext, encryptionContext)
		t.record.BytesIn = uint64(len(req.Message))
		if err != nil {
			return ReEncryptResponse{}, err
		}
		return ReEncryptResponse{Message: made.Message, Source: opened.KeyUse, Destination: made.KeyUse}, nil
	})
}

// toDestination moves what the record says of the message that was opened, or
// was not, to where it names a source. What is said from then on is of the
// destination. The rule that decided last stands in both places.
func (t *transaction) toDestination(name string) {
	r := &t.record
	if r.Key != "" || r.MessageID != "" {
		r.Source = &audit.KeyUse{
			Key: r.Key, KeyVersion: r.KeyVersion, Freshness: r.Freshness, MessageID: r.MessageID, Rule: r.Rule,
		}
	}
	if name != "" {
		r.Key = bounded(name)
	}
	r.KeyVersion, r.Freshness, r.MessageID, r.BytesOut = "", audit.Freshness{}, "", 0
}

// opReEncrypt names the operation in the audit record; policy knows only its
// two halves.
const opReEncrypt policy.Operation = "reencrypt"
