package local

import (
	"bytes"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
)

// VersionRef names one version of one key.
type VersionRef struct {
	Name, Version string
}

// String returns name and version as "orders version 2".
func (v VersionRef) String() string { return v.Name + " version " + v.Version }

// MergeReport says what Merge did, in order of name and version.
type MergeReport struct {
	Added []VersionRef // were missing, are there now
	// Kept lists versions whose state differs: the keystore's state stands. A
	// version destroyed in the keystore is not brought back.
	Kept []VersionRef
}

// Backup writes the whole keystore, disabled versions and destroyed records
// included, as one portable file sealed by seal: normally another seal than the
// keystore's, for this host may be what is lost. The bytes are sealed; still,
// keep them private.
func (k *Keystore) Backup(w io.Writer, seal Seal) error {
	file, err := k.backup(seal)
	if err != nil {
		return err
	}
	if _, err := w.Write(file); err != nil {
		return fmt.Errorf("backup of %s: %w: %w", k.path, ErrWrite, err)
	}
	return nil
}

// BackupFile is Backup to a new file of mode 0600, atomic and durable. It never
// replaces a file: then the error wraps ErrExists.
func (k *Keystore) BackupFile(path string, seal Seal) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("backup %s: %w", path, err)
	}
	file, err := k.backup(seal)
	if err != nil {
		return err
	}
	if err := writeNew(path, file); err != nil {
		return fmt.Errorf("backup %s: %w", path, err)
	}
	return nil
}

func (k *Keystore) backup(seal Seal) ([]byte, error) {
	if err := seal.Validate(); err != nil {
		return nil, fmt.Errorf("backup of %s: %w", k.path, err)
	}
	u := &unlocker{seal: seal}
	defer u.close()
	var file []byte
	err := k.view(func(r *ring) error {
		var err error
		file, err = u.sealRing(r, u.newHeader(backupFile))
		return err
	})
	return file, err
}

// Restore makes a new keystore at path, sealed by seal, from a backup that
// backupSeal opens. It never replaces a keystore: then the error wraps
// ErrExists. The restored keystore keeps its ID, keys, states and key IDs.
func Restore(backup io.Reader, backupSeal Seal, path string, seal Seal) (*Keystore, error) {
	k, err := newKeystore(path, seal)
	if err != nil {
		return nil, err
	}
	r, err := readBackup(backup, backupSeal)
	if err != nil {
		return nil, err
	}
	defer r.free()
	if err := k.establish(r); err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

// Merge adds the keys and versions of a backup that the keystore has not. What
// it has stays as it is, states included. Where the two hold different keys
// under one name and version nothing is changed, and the error wraps
// ErrConflict.
func (k *Keystore) Merge(backup io.Reader, backupSeal Seal) (MergeReport, error) {
	from, err := readBackup(backup, backupSeal)
	if err != nil {
		return MergeReport{}, err
	}
	defer from.free()
	var report MergeReport
	err = k.edit(func(r *ring) (bool, error) {
		report, err = r.merge(from)
		return len(report.Added) > 0, err
	})
	if err != nil {
		return MergeReport{}, err
	}
	return report, nil
}

func readBackup(backup io.Reader, seal Seal) (*ring, error) {
	if err := seal.Validate(); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	file, err := io.ReadAll(io.LimitReader(backup, int64(MaxFileSize)+1))
	if err != nil {
		return nil, fmt.Errorf("backup %w: %w", ErrAccess, err)
	}
	if len(file) > MaxFileSize {
		return nil, fmt.Errorf("backup %w: more than %d bytes: check the path", ErrForeign, MaxFileSize)
	}
	u := &unlocker{seal: seal}
	defer u.close()
	r, _, err := u.open(file, backupFile)
	if err != nil {
		return nil, fmt.Errorf("backup %w", err)
	}
	return r, nil
}

// merge adds what from has more. The material of both rings must live until r
// is marshalled.
func (r *ring) merge(from *ring) (MergeReport, error) {
	var report MergeReport
	for _, theirs := range from.keys {
		i, found := r.find(theirs.name)
		if !found {
			if len(r.keys) >= MaxKeys {
				return MergeReport{}, fmt.Errorf("%w: a keystore holds %d keys: restore to a new path instead", ErrLimit, MaxKeys)
			}
			r.keys = slices.Insert(r.keys, i, key{name: theirs.name})
		}
		if err := r.keys[i].merge(theirs, &report); err != nil {
			return MergeReport{}, err
		}
	}
	return report, nil
}

func (k *key) merge(theirs key, report *MergeReport) error {
	for i, v := range theirs.versions {
		ref := VersionRef{Name: k.name, Version: strconv.Itoa(i + 1)}
		switch {
		case i >= len(k.versions):
			k.versions = append(k.versions, v)
			report.Added = append(report.Added, ref)
		case !bytes.Equal(k.versions[i].id[:], v.id[:]):
			return fmt.Errorf("%w: key %s: restore the backup to a new path and use it as a second backend", ErrConflict, ref)
		case k.versions[i].state != v.state:
			report.Kept = append(report.Kept, ref)
		}
	}
	return nil
}
