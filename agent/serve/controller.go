package serve

import adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"

// Controller is the agent as the admin door sees it.
type Controller interface {
	// Status tells the state of the agent and of all that it depends on,
	// without asking anything upstream.
	Status() *adminv1.StatusResponse
}
