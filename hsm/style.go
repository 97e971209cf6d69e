package hsm

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// ivStyle finds out where the token takes its initialization vectors from: it
// encrypts with a vector that could be nobody's choice, twice, and with another.
func ivStyle(w *worker, k handles) (IVStyle, error) {
	const size = 32
	try := func(first byte) (ciphertext, iv []byte, err error) {
		iv = bytes.Repeat([]byte{first}, gcmIV)
		clear(w.in[:size])
		p := cryptoki.GCM(iv, []byte("kms-agent probe"))
		n, err := w.session.Encrypt(k.key, &p, w.in[:size], w.out)
		return bytes.Clone(w.out[:n]), iv, err
	}
	a, ivA, err := try(0xA5)
	if err != nil {
		if stepFor(err) == giveUp {
			return IVChosen12, nil // a token that is told the length only; the self-test decides
		}
		return 0, err
	}
	b, _, err := try(0xA5)
	if err != nil {
		return 0, err
	}
	c, _, err := try(0x5A)
	if err != nil {
		return 0, err
	}
	switch written := !bytes.Equal(ivA, bytes.Repeat([]byte{0xA5}, gcmIV)); {
	case bytes.Equal(a, c):
		return 0, errors.New("the token uses the same initialization vector whatever it is given: CKM_AES_GCM must not be used")
	case len(a) == size+gcmTag && written:
		return IVWritten, nil
	case len(a) == size+gcmTag && bytes.Equal(a, b):
		return IVCaller, nil
	case len(a) == size+gcmTag+16:
		return IVAppended16, nil
	case len(a) == size+gcmTag+gcmIV:
		return appendedOrNot(w, k, a)
	}
	return 0, fmt.Errorf("CKM_AES_GCM made %d bytes of %d, which is no style that is known", len(a), size)
}

// appendedOrNot tells by opening where the vector is.
func appendedOrNot(w *worker, k handles, wrapped []byte) (IVStyle, error) {
	opens := func(iv, ciphertext []byte) error {
		p := cryptoki.GCM(bytes.Clone(iv), []byte("kms-agent probe"))
		_, err := w.session.Decrypt(k.key, &p, ciphertext, w.out)
		return err
	}
	if opens(wrapped[len(wrapped)-gcmIV:], wrapped[:len(wrapped)-gcmIV]) == nil {
		return IVAppended12, nil
	}
	return IVPrepended12, nil // the self-test decides
}
