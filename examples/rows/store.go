package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	_ "modernc.org/sqlite" // the driver "sqlite", without cgo

	"github.com/kms-agent/kms-agent/client"
)

// ErrNotFound means that there is no such note.
var ErrNotFound = errors.New("no such note")

// schema has what is searched for in clear, and the rest as a message. The
// version of the wrapping key stands beside it to find what is to be moved after
// a rotation; the message says it too.
const schema = `CREATE TABLE IF NOT EXISTS notes (
	tenant      TEXT NOT NULL,
	id          TEXT NOT NULL,
	key_version TEXT NOT NULL,
	body        BLOB NOT NULL,
	PRIMARY KEY (tenant, id)
);
CREATE INDEX IF NOT EXISTS notes_key_version ON notes (key_version);`

// Note is a note in clear.
type Note struct {
	ID         string `json:"id"`
	Text       string `json:"text"`
	KeyVersion string `json:"key_version"`
}

// Store keeps notes of tenants, encrypted. It is safe for concurrent use.
type Store struct {
	db    *sql.DB
	agent *client.Client
	key   string
}

// OpenStore opens the database at path and makes its table where it is missing.
// The agent stays the caller's to close.
func OpenStore(ctx context.Context, path string, agent *client.Client, key string) (*Store, error) {
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=busy_timeout(5000)&_pragma=journal_mode(wal)")
	if err != nil {
		return nil, err
	}
	if _, err := db.ExecContext(ctx, schema); err != nil {
		return nil, errors.Join(fmt.Errorf("make the table: %w", err), db.Close())
	}
	return &Store{db: db, agent: agent, key: key}, nil
}

// Close closes the database.
func (s *Store) Close() error { return s.db.Close() }

// place is the encryption context of a row: where it belongs. It stands in the
// message, authenticated, and whoever reads a row demands it, so that a row that
// was copied to another tenant or ID does not open there. Nothing secret may be
// in it.
func place(tenant, id string) map[string]string {
	return map[string]string{"table": "notes", "tenant": tenant, "id": id}
}

// Put writes a note, new or again.
func (s *Store) Put(ctx context.Context, tenant, id, text string) error {
	sealed, err := s.agent.Encrypt(ctx, &client.EncryptRequest{Key: s.key, Plaintext: []byte(text), Context: place(tenant, id)})
	if err != nil {
		return fmt.Errorf("encrypt note %s/%s: %w", tenant, id, err)
	}
	_, err = s.db.ExecContext(ctx, `INSERT INTO notes (tenant, id, key_version, body) VALUES (?, ?, ?, ?)
		ON CONFLICT (tenant, id) DO UPDATE SET key_version = excluded.key_version, body = excluded.body`,
		tenant, id, sealed.GetKeyUse().GetKeyVersion(), sealed.GetMessage())
	return err
}

// Get reads a note.
func (s *Store) Get(ctx context.Context, tenant, id string) (Note, error) {
	var message []byte
	err := s.db.QueryRowContext(ctx, `SELECT body FROM notes WHERE tenant = ? AND id = ?`, tenant, id).Scan(&message)
	if errors.Is(err, sql.ErrNoRows) {
		return Note{}, ErrNotFound
	}
	if err != nil {
		return Note{}, err
	}
	return s.open(ctx, tenant, id, message)
}

func (s *Store) open(ctx context.Context, tenant, id string, message []byte) (Note, error) {
	opened, err := s.agent.Decrypt(ctx, &client.DecryptRequest{Message: message, ExpectedContext: place(tenant, id)})
	if err != nil {
		return Note{}, fmt.Errorf("decrypt note %s/%s: %w", tenant, id, err)
	}
	return Note{ID: id, Text: string(opened.GetPlaintext()), KeyVersion: opened.GetKeyUse().GetKeyVersion()}, nil
}

// List reads the notes of a tenant, by ID. One that does not open fails it: an
// incomplete list would look like a whole one.
func (s *Store) List(ctx context.Context, tenant string) ([]Note, error) {
	rows, err := s.rows(ctx, `SELECT rowid, tenant, id, body FROM notes WHERE tenant = ? ORDER BY id`, tenant)
	if err != nil {
		return nil, err
	}
	notes := make([]Note, 0, len(rows))
	for _, r := range rows {
		note, err := s.open(ctx, r.tenant, r.id, r.message)
		if err != nil {
			return nil, err
		}
		notes = append(notes, note)
	}
	return notes, nil
}

// row is a note as it is stored.
type row struct {
	number     int64
	tenant, id string
	message    []byte
}

func (s *Store) rows(ctx context.Context, query string, args ...any) (all []row, err error) {
	found, err := s.db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, found.Close()) }()
	for found.Next() {
		var r row
		if err := found.Scan(&r.number, &r.tenant, &r.id, &r.message); err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, found.Err()
}

// batch is how many rows are moved with one query.
const batch = 100

// Report is what ReEncrypt did.
type Report struct {
	Version    string   `json:"version"`    // of the wrapping key, the current one
	Moved      int      `json:"moved"`      // rows that it protects since now
	Unreadable []string `json:"unreadable"` // rows that do not open, left as they are
}

// ReEncrypt moves every row that another version than the wrapping key's current
// one protects. The plaintexts do not leave the agent. It may be stopped at any
// time and started again, beside readers and writers.
func (s *Store) ReEncrypt(ctx context.Context) (Report, error) {
	report := Report{Unreadable: []string{}}
	// Which version new messages get, as of now: without MaxStale the agent would
	// say what it has known for up to the key's max_age.
	probe, err := s.agent.Encrypt(ctx, &client.EncryptRequest{Key: s.key, Context: map[string]string{"table": "notes"}, MaxStale: client.MaxStale(0)})
	if err != nil {
		return report, err
	}
	report.Version = probe.GetKeyUse().GetKeyVersion()
	for last := int64(0); ; {
		rows, err := s.rows(ctx, `SELECT rowid, tenant, id, body FROM notes WHERE key_version <> ? AND rowid > ? ORDER BY rowid LIMIT ?`, report.Version, last, batch)
		if err != nil || len(rows) == 0 {
			return report, err
		}
		for _, r := range rows {
			last = r.number
			done, err := s.move(ctx, r)
			switch {
			case errors.Is(err, client.ErrDecryptFailed), errors.Is(err, client.ErrInvalidMessage):
				report.Unreadable = append(report.Unreadable, r.tenant+"/"+r.id)
			case err != nil:
				return report, err
			case done:
				report.Moved++
			}
		}
	}
}

// move re-encrypts one row, unless somebody has written it meanwhile.
func (s *Store) move(ctx context.Context, r row) (bool, error) {
	made, err := s.agent.ReEncrypt(ctx, &client.ReEncryptRequest{Message: r.message, ExpectedContext: place(r.tenant, r.id)})
	if err != nil {
		return false, fmt.Errorf("re-encrypt note %s/%s: %w", r.tenant, r.id, err)
	}
	result, err := s.db.ExecContext(ctx, `UPDATE notes SET body = ?, key_version = ? WHERE rowid = ? AND body = ?`,
		made.GetMessage(), made.GetDestination().GetKeyVersion(), r.number, r.message)
	if err != nil {
		return false, err
	}
	n, err := result.RowsAffected()
	return n == 1, err
}
