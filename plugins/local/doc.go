// Package local is the embedded backend: AES-256 wrapping keys with versions,
// kept in one sealed keystore file on this host.
//
// [Keystore] administers the file, [Backend] serves it through the plugin
// contract. Any number of processes may use one keystore at the same time:
// every change is a whole new file, put in place by a rename under a lock, and
// a running Backend sees it at its next call. docs/local-backend.md specifies
// the file, the wrapped format and what both protect against.
package local
