package main

import (
	"context"
	"encoding/base64"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// maxDocument bounds the JSON document of an encrypted data key.
const maxDocument = 64 << 10

// secretOutput says where a plaintext key goes. On a command line's output it
// appears only when asked for by name.
type secretOutput struct {
	file  string
	show  bool
	force bool
}

func (s *secretOutput) flags(c *cobra.Command) {
	c.Flags().Var(pathFlag{&s.file}, "plaintext-out", "write the plaintext key, its bare bytes, to this new file of mode 0600")
	c.Flags().BoolVar(&s.show, "show-plaintext", false, "print the plaintext key, in base64, in the JSON output")
	c.Flags().BoolVar(&s.force, "force", false, "replace output files where they exist")
}

// wanted says whether a plaintext was asked for.
func (s *secretOutput) wanted() bool { return s.file != "" || s.show }

func newDatakey(a *app) *cobra.Command {
	c := group("datakey", "Make and open data keys for programs that encrypt by themselves", "")
	c.AddCommand(newDatakeyGenerate(a), newDatakeyDecrypt(a))
	return c
}

// keyCommand is what the commands on single keys have in common.
type keyCommand struct {
	connection
	key     string
	context pairs
	stale   staleness
	secret  secretOutput
}

func newDatakeyGenerate(a *app) *cobra.Command {
	k := keyCommand{}
	c := &cobra.Command{
		Use:   "generate --key KEY",
		Short: "Make a data key",
		Long: `Makes a data key and prints it in encrypted form, as a JSON document that datakey
decrypt reads. Without --plaintext-out and --show-plaintext nobody sees the key in
clear (the operation generate-data-key-without-plaintext).`,
		Example: "  kms-agent datakey generate --key orders --plaintext-out data.key > data.key.json",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if k.key == "" {
				return usagef("which key? Name it with --key")
			}
			return a.generateDataKey(c.Context(), &k)
		},
	}
	c.Flags().StringVarP(&k.key, "key", "k", "", "key of the agent to wrap the data key under")
	k.context.flag(c, "context", "c", "NAME=VALUE of the encryption context, bound to the data key; may be repeated")
	k.stale.flag(c)
	k.secret.flags(c)
	a.documentFlag(c)
	a.connectionFlags(c, &k.connection)
	return c
}

// documentFlag is outputFlag for commands whose output is read by others: it
// defaults to JSON.
func (a *app) documentFlag(c *cobra.Command) {
	a.outputFlag(c)
	c.Flags().Lookup("output").DefValue = string(formatJSON)
	c.PreRun = func(c *cobra.Command, _ []string) {
		if !c.Flags().Changed("output") {
			a.format = formatJSON
		}
	}
}

func (a *app) generateDataKey(ctx context.Context, k *keyCommand) error {
	pairs, err := k.context.parse()
	if err != nil {
		return err
	}
	stale, err := k.stale.value()
	if err != nil {
		return err
	}
	if k.secret.show && a.format != formatJSON {
		return usagef("--show-plaintext goes with --output json")
	}
	out, err := a.secretFile(ctx, &k.secret)
	if err != nil {
		return err
	}
	defer out.discard()
	return a.call(ctx, &k.connection, func(ctx context.Context, c *client.Client) error {
		if !k.secret.wanted() {
			response, err := c.GenerateDataKeyWithoutPlaintext(ctx, &kmsagentv1.GenerateDataKeyWithoutPlaintextRequest{
				Key: k.key, Context: pairs, MaxStale: stale,
			})
			if err != nil {
				return err
			}
			return a.printWrapped(response, response.GetEncryptedDataKey(), response.GetKeyUse())
		}
		response, err := c.GenerateDataKey(ctx, &kmsagentv1.GenerateDataKeyRequest{Key: k.key, Context: pairs, MaxStale: stale})
		if err != nil {
			return err
		}
		defer clear(response.GetPlaintext())
		if err := out.writeSecret(response.GetPlaintext()); err != nil {
			return err
		}
		if !k.secret.show {
			clear(response.Plaintext)
			response.Plaintext = nil
		}
		return a.printWrapped(response, response.GetEncryptedDataKey(), response.GetKeyUse())
	})
}

// secretFile opens the file for a plaintext key before anything is asked of the
// agent; without one the result takes nothing.
func (a *app) secretFile(ctx context.Context, s *secretOutput) (*output, error) {
	if s.file == "" {
		return &output{}, nil
	}
	return a.openOutput(ctx, s.file, modeSecret, s.force)
}

// writeSecret writes and commits a plaintext, where there is a file for it.
func (o *output) writeSecret(secret []byte) error {
	if o.Writer == nil {
		return nil
	}
	if _, err := o.Write(secret); err != nil {
		return err
	}
	return o.commit()
}

// printWrapped prints a response as a document, or an EDK as a table.
func (a *app) printWrapped(response proto.Message, edk *kmsagentv1.EncryptedDataKey, use *kmsagentv1.KeyUse) error {
	return a.print(response, func(t *table) {
		t.row("key", keyUse(use))
		for _, one := range append([]*kmsagentv1.EncryptedDataKey{edk}, edk.GetMore()...) {
			t.row("provider id", one.GetProviderId())
			t.row("provider info", base64.StdEncoding.EncodeToString(one.GetProviderInfo()))
			t.row("ciphertext", base64.StdEncoding.EncodeToString(one.GetCiphertext()))
		}
	})
}

func newDatakeyDecrypt(a *app) *cobra.Command {
	k := keyCommand{}
	var in string
	c := &cobra.Command{
		Use:     "decrypt",
		Short:   "Open a data key that datakey generate made",
		Long:    "Reads the JSON document that datakey generate printed, from standard input or --in.",
		Example: "  kms-agent datakey decrypt --in data.key.json --plaintext-out data.key",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if !k.secret.wanted() {
				return usagef("where should the key go? Name --plaintext-out FILE, or --show-plaintext for the JSON output")
			}
			return a.decryptDataKey(c.Context(), &k, in)
		},
	}
	c.Flags().VarP(pathFlag{&in}, "in", "i", "read this file instead of standard input")
	k.context.flag(c, "context", "c", "NAME=VALUE; exactly the pairs that the data key was made with")
	k.stale.flag(c)
	k.secret.flags(c)
	a.documentFlag(c)
	a.connectionFlags(c, &k.connection)
	return c
}

func (a *app) decryptDataKey(ctx context.Context, k *keyCommand, in string) error {
	request := &kmsagentv1.DecryptDataKeyRequest{}
	var err error
	if request.Context, err = k.context.parse(); err != nil {
		return err
	}
	if request.MaxStale, err = k.stale.value(); err != nil {
		return err
	}
	if k.secret.show && a.format != formatJSON {
		return usagef("--show-plaintext goes with --output json")
	}
	if request.EncryptedDataKey, err = a.readWrapped(ctx, in); err != nil {
		return err
	}
	out, err := a.secretFile(ctx, &k.secret)
	if err != nil {
		return err
	}
	defer out.discard()
	return a.call(ctx, &k.connection, func(ctx context.Context, c *client.Client) error {
		response, err := c.DecryptDataKey(ctx, request)
		if err != nil {
			return err
		}
		defer clear(response.GetPlaintext())
		if err := out.writeSecret(response.GetPlaintext()); err != nil {
			return err
		}
		if !k.secret.show {
			clear(response.Plaintext)
			response.Plaintext = nil
		}
		return a.print(response, func(t *table) {
			t.row("key", keyUse(response.GetKeyUse()))
			t.row("use until", when(response.GetUseUntil().AsTime()))
		})
	})
}

// readWrapped reads the document that datakey generate or wrap printed, or an
// encrypted data key alone.
func (a *app) readWrapped(ctx context.Context, path string) (*kmsagentv1.EncryptedDataKey, error) {
	data, err := a.readInput(ctx, path, maxDocument, "the document")
	if err != nil {
		return nil, err
	}
	edk, err := parseWrapped(data)
	if err != nil {
		return nil, &codedError{
			code: exitInvalid, hint: "it takes the JSON document that datakey generate or wrap printed", prefix: source(path) + ": ", err: err,
		}
	}
	return edk, nil
}

func parseWrapped(data []byte) (*kmsagentv1.EncryptedDataKey, error) {
	lenient := protojson.UnmarshalOptions{DiscardUnknown: true}
	generated, wrapped, bare := &kmsagentv1.GenerateDataKeyResponse{}, &kmsagentv1.WrapResponse{}, &kmsagentv1.EncryptedDataKey{}
	var edk *kmsagentv1.EncryptedDataKey
	if err := lenient.Unmarshal(data, generated); err == nil && generated.GetEncryptedDataKey() != nil {
		clear(generated.GetPlaintext())
		edk = generated.GetEncryptedDataKey()
	} else if err := lenient.Unmarshal(data, wrapped); err == nil && wrapped.GetWrapped() != nil {
		edk = wrapped.GetWrapped()
	} else if err := protojson.Unmarshal(data, bare); err == nil {
		edk = bare
	}
	if len(edk.GetCiphertext()) == 0 {
		return nil, errNoWrapped
	}
	return edk, nil
}
