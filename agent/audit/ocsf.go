package audit

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
)

// OCSFVersion is the version of the Open Cybersecurity Schema Framework that
// FormatOCSF follows; its class is API Activity.
const OCSFVersion = "1.3.0"

// What OCSF calls API Activity, and its activities.
const (
	ocsfCategory = 6
	ocsfClass    = 6003

	ocsfCreate = 1
	ocsfRead   = 2
	ocsfUpdate = 3
	ocsfDelete = 4
	ocsfOther  = 99
)

// producer is who writes the records, in formats that say so.
type producer struct {
	host, version string
	pid           int
	chain         string
}

type ocsfEvent struct {
	Activity     int            `json:"activity_id"`
	ActivityName string         `json:"activity_name"`
	Category     int            `json:"category_uid"`
	Class        int            `json:"class_uid"`
	Type         int            `json:"type_uid"`
	Time         int64          `json:"time"`
	StartTime    int64          `json:"start_time,omitempty"`
	Duration     int64          `json:"duration,omitempty"`
	Count        uint64         `json:"count,omitempty"`
	Severity     int            `json:"severity_id"`
	Status       int            `json:"status_id"`
	StatusCode   string         `json:"status_code,omitempty"`
	StatusDetail string         `json:"status_detail,omitempty"`
	Message      string         `json:"message"`
	Metadata     ocsfMetadata   `json:"metadata"`
	Actor        ocsfActor      `json:"actor"`
	API          ocsfAPI        `json:"api"`
	Source       ocsfEndpoint   `json:"src_endpoint"`
	Resources    []ocsfResource `json:"resources,omitempty"`
	Unmapped     ocsfUnmapped   `json:"unmapped"`
}

type ocsfMetadata struct {
	Version      string      `json:"version"`
	Product      ocsfProduct `json:"product"`
	UID          string      `json:"uid"`
	Sequence     uint64      `json:"sequence"`
	Correlation  string      `json:"correlation_uid,omitempty"`
	LogName      string      `json:"log_name"`
	OriginalTime string      `json:"original_time"`
}

type ocsfProduct struct {
	Name    string `json:"name"`
	Vendor  string `json:"vendor_name"`
	Version string `json:"version,omitempty"`
}

type ocsfActor struct {
	AppName        string              `json:"app_name,omitempty"`
	User           *ocsfUser           `json:"user,omitempty"`
	Process        *ocsfProcess        `json:"process,omitempty"`
	Authorizations []ocsfAuthorization `json:"authorizations,omitempty"`
}

type ocsfUser struct {
	UID string `json:"uid"`
}

type ocsfProcess struct {
	PID  int32    `json:"pid"`
	User ocsfUser `json:"user"`
}

type ocsfAuthorization struct {
	Decision string      `json:"decision"`
	Policy   *ocsfPolicy `json:"policy,omitempty"`
}

type ocsfPolicy struct {
	Name string `json:"name"`
}

type ocsfAPI struct {
	Operation string        `json:"operation"`
	Service   ocsfService   `json:"service"`
	Request   *ocsfRequest  `json:"request,omitempty"`
	Response  *ocsfResponse `json:"response,omitempty"`
}

type ocsfService struct {
	Name string `json:"name"`
}

type ocsfRequest struct {
	UID string `json:"uid"`
}

type ocsfResponse struct {
	Error   string `json:"error"`
	Message string `json:"error_message,omitempty"`
}

type ocsfEndpoint struct {
	Hostname string `json:"hostname"`
}

type ocsfResource struct {
	Name    string `json:"name"`
	Type    string `json:"type"`
	Version string `json:"version,omitempty"`
}

// ocsfUnmapped has the fields of a record that the class has no place for, by
// their own names.
type ocsfUnmapped struct {
	Kind           Kind              `json:"kind"`
	Door           string            `json:"door,omitempty"`
	Proof          string            `json:"proof,omitempty"`
	GID            *uint32           `json:"gid,omitempty"`
	Source         *KeyUse           `json:"source,omitempty"`
	ContextKeys    []string          `json:"context_keys,omitempty"`
	ContextHMAC    map[string]string `json:"context_hmac,omitempty"`
	Context        map[string]string `json:"context,omitempty"`
	MessageID      string            `json:"message_id,omitempty"`
	Freshness      Freshness         `json:"freshness,omitzero"`
	Backend        string            `json:"backend,omitempty"`
	UpstreamMicros int64             `json:"upstream_us,omitempty"`
	BytesIn        uint64            `json:"bytes_in,omitempty"`
	BytesOut       uint64            `json:"bytes_out,omitempty"`
	Log            *LogEvent         `json:"log,omitempty"`
	MAC            string            `json:"mac"`
}

// ocsf returns the record as one event of API Activity, without a newline.
func (p *producer) ocsf(r *Record, s signedLine) ([]byte, error) {
	activity, name := ocsfActivity(r)
	severity, status := ocsfOutcome(r)
	e := ocsfEvent{
		Activity: activity, ActivityName: name, Category: ocsfCategory, Class: ocsfClass, Type: ocsfClass*100 + activity,
		Time: r.Time.UnixMilli(), Duration: r.DurationMicros / 1000, Count: r.Count,
		Severity: severity, Status: status, StatusCode: r.Reason, StatusDetail: r.Detail, Message: ocsfMessage(r),
		Metadata: ocsfMetadata{
			Version: OCSFVersion, Product: ocsfProduct{Name: "kms-agent", Vendor: "kms-agent", Version: p.version},
			UID: p.chain + "-" + strconv.FormatUint(s.sequence, 10), Sequence: s.sequence, Correlation: r.RequestID,
			LogName: "audit", OriginalTime: r.Time.UTC().Format("2006-01-02T15:04:05.999999999Z07:00"),
		},
		Actor: ocsfActorOf(r),
		API:   ocsfAPI{Operation: cmp.Or(r.Operation, "unknown"), Service: ocsfService{"kms-agent"}},
		// Callers are processes of this host.
		Source: ocsfEndpoint{Hostname: p.host},
		Unmapped: ocsfUnmapped{
			Kind: r.Kind, Door: r.Door, Proof: r.Caller.Proof, Source: r.Source,
			ContextKeys: r.ContextKeys, ContextHMAC: r.ContextHMAC, Context: r.Context, MessageID: r.MessageID,
			Freshness: r.Freshness, Backend: r.Backend, UpstreamMicros: r.UpstreamMicros,
			BytesIn: r.BytesIn, BytesOut: r.BytesOut, Log: r.Log, MAC: hex.EncodeToString(s.mac[:]),
		},
	}
	if !r.Since.IsZero() {
		e.StartTime = r.Since.UnixMilli()
	}
	if r.Caller != (Caller{}) {
		e.Unmapped.GID = &r.Caller.GID
	}
	if r.RequestID != "" {
		e.API.Request = &ocsfRequest{r.RequestID}
	}
	if r.Reason != "" {
		e.API.Response = &ocsfResponse{r.Reason, r.Detail}
	}
	for _, k := range ocsfKeys(r) {
		e.Resources = append(e.Resources, ocsfResource{Name: k.Key, Type: "key", Version: k.KeyVersion})
	}
	text, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("write record %d as OCSF: %w", s.sequence, err)
	}
	return text, nil
}

// ocsfActivity says which of the class's activities an operation is.
func ocsfActivity(r *Record) (id int, name string) {
	switch r.Operation {
	case "encrypt", "wrap", "generate-data-key", "generate-data-key-without-plaintext", "generate-random":
		return ocsfCreate, "Create"
	case "decrypt", "unwrap", "decrypt-data-key", "describe", "list-keys", "whoami", "status", "profile":
		return ocsfRead, "Read"
	case "reencrypt", "reload", "restart-plugin", "set-log-level":
		return ocsfUpdate, "Update"
	case "evict":
		return ocsfDelete, "Delete"
	}
	return ocsfOther, r.Operation
}

func ocsfOutcome(r *Record) (severity, status int) {
	switch {
	case r.Outcome == Success:
		return 1, 1 // informational, success
	case r.Outcome == Denied:
		return 3, 2 // medium, failure
	case r.Outcome == Error:
		return 2, 2 // low, failure
	case r.Kind == KindEvent:
		return 2, 0 // low, unknown
	}
	return 1, 0
}

func ocsfMessage(r *Record) string {
	message := r.Operation
	if r.Key != "" {
		message += " " + r.Key
	}
	if r.Outcome != "" {
		return message + ": " + string(r.Outcome)
	}
	return message + ": " + string(r.Kind)
}

func ocsfActorOf(r *Record) ocsfActor {
	var a ocsfActor
	switch {
	case r.Caller != (Caller{}):
		a.Process = &ocsfProcess{r.Caller.PID, ocsfUser{strconv.FormatUint(uint64(r.Caller.UID), 10)}}
	case r.Kind == KindEvent:
		a.AppName = "kms-agent"
	default:
		a.AppName = "unidentified"
	}
	if r.Caller.SPIFFEID != "" {
		a.User = &ocsfUser{r.Caller.SPIFFEID}
	}
	switch {
	case r.Rule != "" && r.Outcome == Denied:
		a.Authorizations = []ocsfAuthorization{{"denied", &ocsfPolicy{r.Rule}}}
	case r.Rule != "":
		a.Authorizations = []ocsfAuthorization{{"allowed", &ocsfPolicy{r.Rule}}}
	case r.Outcome == Denied:
		a.Authorizations = []ocsfAuthorization{{Decision: "denied"}}
	}
	return a
}

// ocsfKeys are the keys that a record names.
func ocsfKeys(r *Record) []KeyUse {
	var keys []KeyUse
	if r.Key != "" {
		keys = append(keys, KeyUse{Key: r.Key, KeyVersion: r.KeyVersion})
	}
	if r.Source != nil && r.Source.Key != "" {
		keys = append(keys, *r.Source)
	}
	return keys
}
