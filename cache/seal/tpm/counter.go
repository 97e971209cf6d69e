package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/kms-agent/kms-agent/cache/seal"
)

const counterSize = 8

// attributes of the counter: whoever may use the TPM may read and increment it,
// which can cost a store, never bring an old one back.
func attributes() tpm2.TPMANV {
	return tpm2.TPMANV{NT: tpm2.TPMNTCounter, AuthRead: true, AuthWrite: true, NoDA: true}
}

// prepareCounter makes the counter where there is none and leaves alone what
// something else has put there.
func (s *Sealer) prepareCounter() error {
	public, _, err := s.index()
	if isAbsent(err) {
		if err = s.define(); err == nil {
			public, _, err = s.index()
		}
	}
	if err != nil {
		return err
	}
	has := public.Attributes
	written := has.Written
	has.Written = false
	if has != attributes() || public.DataSize != counterSize {
		return fmt.Errorf("NV index %#x belongs to something else: configure another one", s.config.Index)
	}
	if !written {
		_, err = s.increment() // it has no value before
	}
	return err
}

// index returns what is at the index and its name.
func (s *Sealer) index() (*tpm2.TPMSNVPublic, *tpm2.AuthHandle, error) {
	if s.tpm == nil {
		return nil, nil, errClosed
	}
	found, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(s.config.Index)}.Execute(s.tpm)
	if err != nil {
		return nil, nil, fmt.Errorf("counter: %w", err)
	}
	public, err := found.NVPublic.Contents()
	if err != nil {
		return nil, nil, fmt.Errorf("counter: %w", err)
	}
	return public, &tpm2.AuthHandle{
		Handle: tpm2.TPMHandle(s.config.Index), Name: found.NVName, Auth: tpm2.PasswordAuth(nil),
	}, nil
}

func (s *Sealer) define() error {
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: tpm2.TPMHandle(s.config.Index), NameAlg: tpm2.TPMAlgSHA256, Attributes: attributes(), DataSize: counterSize,
		}),
	}.Execute(s.tpm)
	if err != nil {
		return fmt.Errorf("make the counter: %w", err)
	}
	return nil
}

// isAbsent: the TPM knows no such handle.
func isAbsent(err error) bool { return errors.Is(err, tpm2.TPMRCHandle) }

func (s *Sealer) read() (uint64, error) {
	_, handle, err := s.index()
	if err != nil {
		return 0, err
	}
	got, err := tpm2.NVRead{AuthHandle: *handle, NVIndex: tpm2.NamedHandle{Handle: handle.Handle, Name: handle.Name}, Size: counterSize}.Execute(s.tpm)
	if err != nil {
		return 0, fmt.Errorf("read the counter: %w", err)
	}
	if len(got.Data.Buffer) != counterSize {
		return 0, fmt.Errorf("the counter has %d bytes", len(got.Data.Buffer))
	}
	return binary.BigEndian.Uint64(got.Data.Buffer), nil
}

func (s *Sealer) increment() (uint64, error) {
	_, handle, err := s.index()
	if err != nil {
		return 0, err
	}
	if _, err := (tpm2.NVIncrement{AuthHandle: *handle, NVIndex: tpm2.NamedHandle{Handle: handle.Handle, Name: handle.Name}}).Execute(s.tpm); err != nil {
		return 0, fmt.Errorf("increment the counter: %w", err)
	}
	return s.read()
}

// Counter is seal.Sealer's.
func (s *Sealer) Counter() (uint64, error) {
	n, err := s.read()
	if isAbsent(err) {
		return 0, fmt.Errorf("%w: %s: the counter was removed since: restart the agent, which then starts without its store", seal.ErrUnavailable, s)
	}
	if err != nil {
		return 0, s.unavailable(err)
	}
	return n, nil
}

// Advance is seal.Sealer's.
func (s *Sealer) Advance() (uint64, error) {
	n, err := s.increment()
	if err != nil {
		return 0, s.unavailable(err)
	}
	return n, nil
}
