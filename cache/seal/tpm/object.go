package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/kms-agent/kms-agent/cache/seal"
)

// maxObject bounds a sealed secret: its public area (2 bytes of length, then
// TPMT_PUBLIC) and its private area (the same, TPM2B_PRIVATE). Usual are 270.
const maxObject = 1024

var (
	errObject  = errors.New("the sealed secret is malformed")
	errNotOurs = errors.New("the TPM does not accept the sealed secret")
)

// parent is the storage primary key while it is loaded.
type parent struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// withParent makes the storage primary key and calls use with it.
func withParent(t transport.TPM, use func(*parent) error) (err error) {
	made, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHOwner,
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(t)
	if err != nil {
		return fmt.Errorf("storage primary key: %w", err)
	}
	defer func() { err = errors.Join(err, flush(t, made.ObjectHandle)) }()
	public, err := made.OutPublic.Contents()
	if err != nil {
		return fmt.Errorf("storage primary key: %w", err)
	}
	return use(&parent{handle: made.ObjectHandle, name: made.Name, public: *public})
}

// auth authorizes one command. Its session is salted to the parent, so that who
// listens on the wire to the TPM learns no secret.
func (p *parent) auth(of tpm2.TPMHandle, name tpm2.TPM2BName, secret tpm2.AuthOption) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: of, Name: name, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Salted(p.handle, p.public), secret)}
}

func flush(t transport.TPM, handle tpm2.TPMHandle) error {
	if _, err := (tpm2.FlushContext{FlushHandle: handle}).Execute(t); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

// sealSecret returns the object that holds the secret.
func (s *Sealer) sealSecret(secret []byte) ([]byte, error) {
	if s.tpm == nil {
		return nil, errClosed
	}
	var object []byte
	err := withParent(s.tpm, func(p *parent) error {
		made, err := tpm2.Create{
			ParentHandle: p.auth(p.handle, p.name, tpm2.AESEncryption(128, tpm2.EncryptIn)),
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret}),
			}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true, NoDA: true},
			}),
		}.Execute(s.tpm)
		if err != nil {
			return fmt.Errorf("seal the secret: %w", err)
		}
		object = append(tpm2.Marshal(made.OutPublic), tpm2.Marshal(made.OutPrivate)...)
		if len(object) > maxObject {
			return fmt.Errorf("%w: %d bytes", errObject, len(object))
		}
		return nil
	})
	return object, err
}

// unsealSecret returns the secret in object; the caller clears it.
func (s *Sealer) unsealSecret(object []byte) ([]byte, error) {
	if s.tpm == nil {
		return nil, errClosed
	}
	public, private, err := splitObject(object)
	if err != nil {
		return nil, err
	}
	var secret []byte
	err = withParent(s.tpm, func(p *parent) error {
		loaded, err := tpm2.Load{
			ParentHandle: p.auth(p.handle, p.name, tpm2.AESEncryption(128, tpm2.EncryptIn)),
			InPublic:     *public, InPrivate: *private,
		}.Execute(s.tpm)
		if err != nil {
			return loadError(err)
		}
		opened, err := tpm2.Unseal{
			ItemHandle: p.auth(loaded.ObjectHandle, loaded.Name, tpm2.AESEncryption(128, tpm2.EncryptOut)),
		}.Execute(s.tpm)
		if err == nil {
			secret = opened.OutData.Buffer
		}
		return errors.Join(err, flush(s.tpm, loaded.ObjectHandle))
	})
	if err == nil && len(secret) != seal.SecretSize {
		err = fmt.Errorf("%w: a secret of %d bytes", errObject, len(secret))
	}
	return secret, err
}

// loadError tells an object that this TPM does not accept from a TPM that does
// not work: the first is an error about a parameter (format one of TPM 2.0 part
// 2, section 6.6).
func loadError(err error) error {
	var parameter tpm2.TPMFmt1Error
	if errors.As(err, &parameter) {
		return errors.Join(errNotOurs, err)
	}
	return fmt.Errorf("load the secret: %w", err)
}

// splitObject takes public and private area apart. The TPM checks what is in
// them.
func splitObject(object []byte) (*tpm2.TPM2BPublic, *tpm2.TPM2BPrivate, error) {
	if len(object) < 2 || len(object) > maxObject {
		return nil, nil, fmt.Errorf("%w: %d bytes", errObject, len(object))
	}
	middle := 2 + int(binary.BigEndian.Uint16(object))
	if middle+2 > len(object) || middle+2+int(binary.BigEndian.Uint16(object[middle:])) != len(object) {
		return nil, nil, fmt.Errorf("%w: its lengths do not fit", errObject)
	}
	public := tpm2.BytesAs2B[tpm2.TPMTPublic](object[2:middle])
	private := tpm2.TPM2BPrivate{Buffer: object[middle+2:]}
	return &public, &private, nil
}
