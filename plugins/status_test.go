package plugins

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

func TestErrorsCrossTheWire(t *testing.T) {
	seen := map[codes.Code]Class{}
	for _, class := range Classes() {
		sent := &Error{Class: class, RetryAfter: 1500 * time.Millisecond, Detail: "the detail", Err: errors.New("the cause")}
		got := fromStatus(t.Context(), toStatus(fmt.Errorf("around: %w", sent)))
		if got.Class != class || got.RetryAfter != sent.RetryAfter || !strings.Contains(got.Detail, "the detail: the cause") {
			t.Errorf("%s: got %+v", class, got)
		}
		code := status.Code(toStatus(sent))
		if other, taken := seen[code]; taken {
			t.Errorf("%s and %s have the same code %s", class, other, code)
		}
		seen[code] = class
	}
	if err := toStatus(nil); err != nil {
		t.Errorf("no error: got %v", err)
	}
}

// That an outage is of one key alone is said of outages only, by who knows the word.
func TestKeyOnlyCrossesTheWire(t *testing.T) {
	for _, class := range Classes() {
		for _, said := range []bool{false, true} {
			got := fromStatus(t.Context(), toStatus(fmt.Errorf("around: %w", &Error{Class: class, KeyOnly: said})))
			if want := said && class == Unavailable; got.Class != class || got.KeyOnly != want || IsKeyOnly(got) != want {
				t.Errorf("%s with KeyOnly %v: got %+v", class, said, got)
			}
		}
	}
	for _, info := range []*errdetails.ErrorInfo{
		{Domain: errorDomain, Reason: "Denied", Metadata: map[string]string{keyOnly: "true"}},
		{Domain: errorDomain, Reason: "Unavailable", Metadata: map[string]string{keyOnly: "false"}},
		{Domain: "elsewhere", Reason: "Unavailable", Metadata: map[string]string{keyOnly: "true"}},
		{Domain: errorDomain, Reason: "Unavailable"},
	} {
		s, err := status.New(codes.Unavailable, "text").WithDetails(info)
		if err != nil {
			t.Fatal(err)
		}
		if got := fromStatus(t.Context(), s.Err()); got.KeyOnly {
			t.Errorf("%v: got %+v, want that nothing is said of one key", info, got)
		}
	}
}

func TestErrorsOfNoClassAreInternal(t *testing.T) {
	for _, err := range []error{errors.New("plain"), &Error{}, &Error{Class: 99}, status.Error(codes.PermissionDenied, "x")} {
		if got := fromStatus(t.Context(), toStatus(err)); got.Class != Internal {
			t.Errorf("%v: got %s, want Internal", err, got.Class)
		}
	}
	for _, err := range []error{context.DeadlineExceeded, fmt.Errorf("around: %w", context.Canceled)} {
		if got := fromStatus(t.Context(), toStatus(err)); got.Class != Unavailable {
			t.Errorf("%v: got %s, want Unavailable", err, got.Class)
		}
	}
}

// A no is believed only where it is said in the contract's own words.
func TestForeignStatusesFailSafe(t *testing.T) {
	info := func(domain, reason string) protoadapt.MessageV1 {
		return &errdetails.ErrorInfo{Domain: domain, Reason: reason}
	}
	for _, c := range []struct {
		code    codes.Code
		details []protoadapt.MessageV1
		want    Class
	}{
		{codes.PermissionDenied, nil, Internal},
		{codes.NotFound, nil, Internal},
		{codes.FailedPrecondition, nil, Internal},
		{codes.Unimplemented, nil, Internal},
		{codes.ResourceExhausted, nil, Internal},
		{codes.Unknown, nil, Internal},
		{codes.Code(77), nil, Internal},
		{codes.NotFound, []protoadapt.MessageV1{info("elsewhere", "KeyNotFound")}, Internal},
		{codes.NotFound, []protoadapt.MessageV1{info(errorDomain, "keynotfound")}, Internal},
		{codes.Unavailable, []protoadapt.MessageV1{info(errorDomain, "Novelty")}, Internal},
		{codes.Unavailable, []protoadapt.MessageV1{info(errorDomain, "Unknown")}, Internal},
		{codes.Internal, []protoadapt.MessageV1{info(errorDomain, "Denied")}, Denied},
		{codes.Unavailable, nil, Unavailable},
		{codes.DeadlineExceeded, nil, Unavailable},
		{codes.Canceled, nil, Unavailable},
	} {
		s, err := status.New(c.code, "text").WithDetails(c.details...)
		if err != nil {
			t.Fatal(err)
		}
		if got := fromStatus(t.Context(), s.Err()); got.Class != c.want {
			t.Errorf("%s with %v: got %s, want %s", c.code, c.details, got.Class, c.want)
		}
	}
}

func TestRetryAfterIsBounded(t *testing.T) {
	for sent, want := range map[time.Duration]time.Duration{-time.Second: 0, time.Second: time.Second, 1000 * time.Hour: maxRetryAfter} {
		s, err := status.New(codes.Unavailable, "").WithDetails(
			&errdetails.ErrorInfo{Domain: errorDomain, Reason: "Unavailable"}, &errdetails.RetryInfo{RetryDelay: durationpb.New(sent)})
		if err != nil {
			t.Fatal(err)
		}
		if got := fromStatus(t.Context(), s.Err()).RetryAfter; got != want {
			t.Errorf("%s: got %s, want %s", sent, got, want)
		}
	}
}

func TestTheCallersEndIsTheCause(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := fromStatus(ctx, status.Error(codes.Canceled, "x")); !errors.Is(err, context.Canceled) || err.Class != Unavailable {
		t.Errorf("got %v, want Unavailable because of the cancellation", err)
	}
}

func TestPrintable(t *testing.T) {
	for _, c := range []struct {
		in    string
		limit int
		want  string
	}{
		{"plain text, naïve", 100, "plain text, naïve"},
		{"a\x1b[31mred\n", 100, "a�[31mred�"},
		{"\xff\xfe", 100, "�"},
		{"right\u202eleft", 100, "right�left"},
		{"ää", 3, "ä"},
		{"abc", 0, ""},
	} {
		if got := Printable(c.in, c.limit); got != c.want {
			t.Errorf("Printable(%q, %d): got %q, want %q", c.in, c.limit, got, c.want)
		}
	}
}

func FuzzPrintable(f *testing.F) {
	f.Add("text\x00\xff", 3)
	f.Fuzz(func(t *testing.T, text string, limit int) {
		limit = max(0, min(limit, 1<<16))
		got := Printable(text, limit)
		if !utf8.ValidString(got) || utf8.RuneCountInString(got) > limit {
			t.Errorf("Printable(%q, %d): got %q", text, limit, got)
		}
	})
}
