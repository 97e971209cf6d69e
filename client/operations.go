package client

import (
	"context"

	"google.golang.org/grpc"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// unary calls one operation, again where that is worth it, and translates its
// error.
func unary[Q, A any](ctx context.Context, c *Client, call func(context.Context, *Q, ...grpc.CallOption) (*A, error), request *Q) (answer *A, err error) {
	err = c.retried(ctx, func() error {
		answer, err = call(ctx, request)
		return err
	})
	if err != nil {
		return nil, err
	}
	return answer, nil
}

// Encrypt encrypts what fits one request, 1 MiB where the agent is not configured
// otherwise; EncryptStream takes any length.
func (c *Client) Encrypt(ctx context.Context, r *EncryptRequest) (*EncryptResponse, error) {
	return unary(ctx, c, c.rpc.Encrypt, r)
}

// Decrypt opens a message that fits one request; DecryptStream takes any length.
func (c *Client) Decrypt(ctx context.Context, r *DecryptRequest) (*DecryptResponse, error) {
	return unary(ctx, c, c.rpc.Decrypt, r)
}

// ReEncrypt opens a message and makes a new one, inside the agent.
func (c *Client) ReEncrypt(ctx context.Context, r *ReEncryptRequest) (*ReEncryptResponse, error) {
	return unary(ctx, c, c.rpc.ReEncrypt, r)
}

// GenerateDataKey returns a new data key, in clear and encrypted. The caller
// clears the plaintext when it is done with it.
func (c *Client) GenerateDataKey(ctx context.Context, r *GenerateDataKeyRequest) (*GenerateDataKeyResponse, error) {
	return unary(ctx, c, c.rpc.GenerateDataKey, r)
}

// GenerateDataKeyWithoutPlaintext returns a new data key, encrypted only.
func (c *Client) GenerateDataKeyWithoutPlaintext(ctx context.Context, r *GenerateDataKeyWithoutPlaintextRequest) (*GenerateDataKeyWithoutPlaintextResponse, error) {
	return unary(ctx, c, c.rpc.GenerateDataKeyWithoutPlaintext, r)
}

// DecryptDataKey opens a data key made by GenerateDataKey. The caller clears the
// plaintext when it is done with it.
func (c *Client) DecryptDataKey(ctx context.Context, r *DecryptDataKeyRequest) (*DecryptDataKeyResponse, error) {
	return unary(ctx, c, c.rpc.DecryptDataKey, r)
}

// Wrap wraps up to 4096 bytes of key material under the wrapping key itself.
func (c *Client) Wrap(ctx context.Context, r *WrapRequest) (*WrapResponse, error) {
	return unary(ctx, c, c.rpc.Wrap, r)
}

// Unwrap opens what Wrap made. The caller clears the plaintext when it is done
// with it.
func (c *Client) Unwrap(ctx context.Context, r *UnwrapRequest) (*UnwrapResponse, error) {
	return unary(ctx, c, c.rpc.Unwrap, r)
}

// GenerateRandom returns random bytes.
func (c *Client) GenerateRandom(ctx context.Context, r *GenerateRandomRequest) (*GenerateRandomResponse, error) {
	return unary(ctx, c, c.rpc.GenerateRandom, r)
}

// DescribeKey describes one key.
func (c *Client) DescribeKey(ctx context.Context, r *DescribeKeyRequest) (*DescribeKeyResponse, error) {
	return unary(ctx, c, c.rpc.DescribeKey, r)
}

// ListKeys returns one page of the keys that the caller may describe.
func (c *Client) ListKeys(ctx context.Context, r *ListKeysRequest) (*ListKeysResponse, error) {
	return unary(ctx, c, c.rpc.ListKeys, r)
}

// WhoAmI says who the agent takes the caller for.
func (c *Client) WhoAmI(ctx context.Context) (*WhoAmIResponse, error) {
	return unary(ctx, c, c.rpc.WhoAmI, &kmsagentv1.WhoAmIRequest{})
}
