// Package hsm uses keys inside a PKCS#11 token without taking them out.
//
// A Token is attached to one token of one module and stays so through lost
// sessions, stale handles, lost logins and lost connections. Key material is
// wrapped under versions of keys that are generated on the token and never leave
// it; what is known of a key (versions, suites, canaries) stands beside it on the
// token. What no call can cure, a call that never comes back from the module, is
// reported by Dead: the process must end.
package hsm
