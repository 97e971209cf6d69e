package chaos

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kms-agent/kms-agent/client"
)

const (
	// patience is a deadline in which an agent that works well always answers.
	patience = 8 * time.Second
	// workers is how many goroutines each caller has.
	workers = 3
)

// message is one that the agent returned, with what was encrypted.
type message struct {
	key               string
	sealed, plaintext []byte
}

// exported is a data key, or key material, that the agent returned wrapped.
type exported struct {
	key       string
	edk       *client.EncryptedDataKey
	plaintext []byte
	wrap      bool
}

// kept is all that was returned, by all callers.
type kept struct {
	mu       sync.Mutex // guards what follows
	messages []message
	keys     []exported
	streams  int
}

func (k *kept) add(m message) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.messages = append(k.messages, m)
}

// addStream keeps the first of them only: they are large.
func (k *kept) addStream(m message) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.streams++; k.streams <= 200 {
		k.messages = append(k.messages, m)
	}
}

func (k *kept) addKey(e exported) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys = append(k.keys, e)
}

// pick returns a message, an old one or one of the newest.
func (k *kept) pick(r *rand.Rand, fits func(string) bool) (message, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for range 20 {
		n := len(k.messages)
		if n == 0 {
			break
		}
		i := r.IntN(n)
		if r.IntN(3) > 0 {
			i = n - 1 - r.IntN(min(n, 50))
		}
		if m := k.messages[i]; fits(m.key) {
			return m, true
		}
	}
	return message{}, false
}

func (k *kept) pickKey(r *rand.Rand, wrap bool) (exported, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for range 20 {
		if len(k.keys) == 0 {
			break
		}
		if e := k.keys[r.IntN(len(k.keys))]; e.wrap == wrap {
			return e, true
		}
	}
	return exported{}, false
}

// caller is one identity, with its connection.
type caller struct {
	name string
	c    *client.Client
	rec  *recorder
	kept *kept
}

// worker does one thing after the other as a caller.
type worker struct {
	*caller
	r *rand.Rand
}

func (cl *cluster) caller(name string, rec *recorder, k *kept) *caller {
	cl.t.Helper()
	o := client.Options{Socket: cl.path("kms.sock"), Retry: -1}
	if name != "carol" {
		o.WorkloadAPI = "unix://" + cl.path("api/"+name)
	}
	c, err := client.Dial(cl.t.Context(), o)
	if err != nil {
		cl.t.Fatal(err)
	}
	cl.t.Cleanup(func() { _ = c.Close() })
	return &caller{name: name, c: c, rec: rec, kept: k}
}

// work lets all callers work until ctx ends. A call that is under way is waited for.
func work(ctx context.Context, callers []*caller, seed uint64) {
	var all sync.WaitGroup
	for i, c := range callers {
		for j := range workers {
			w := &worker{c, rand.New(rand.NewPCG(seed, uint64(1000+10*i+j)))}
			all.Go(func() {
				for ctx.Err() == nil {
					w.one()
					select {
					case <-ctx.Done():
					case <-time.After(time.Duration(5+w.r.IntN(40)) * time.Millisecond):
					}
				}
			})
		}
	}
	all.Wait()
}

// deed is something that a worker does, so often out of all.
type deed struct {
	weight int
	do     func(*worker)
}

func deeds() []deed {
	return []deed{
		{30, (*worker).encrypt}, {34, (*worker).decrypt}, {8, (*worker).reencrypt}, {3, (*worker).stream},
		{5, (*worker).generate}, {5, (*worker).decryptKey}, {3, (*worker).wrap}, {3, (*worker).unwrap},
		{4, (*worker).forbidden}, {5, (*worker).hostile}, {4, (*worker).hasty},
	}
}

func (w *worker) one() {
	total := 0
	for _, d := range deeds() {
		total += d.weight
	}
	n := w.r.IntN(total)
	for _, d := range deeds() {
		if n -= d.weight; n < 0 {
			d.do(w)
			return
		}
	}
}

// may tells whether the caller's rules give it a key.
func (w *worker) may(key string) bool { return w.rec.h.Setup.Allowed[w.name+" "+key+" decrypt"] }

func (w *worker) key() string {
	for {
		if k := []string{"orders", "ledger", "notes", "pair"}[w.r.IntN(4)]; w.may(k) {
			return k
		}
	}
}

func (w *worker) payload() []byte {
	b := make([]byte, 1+w.r.IntN(1500))
	_, _ = crand.Read(b) // it never fails
	return b
}

// begin begins a call.
func (w *worker) begin(operation, key string) (*call, context.Context, func()) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	return &call{Caller: w.name, Operation: operation, Key: key, Patience: patience, Start: w.rec.now()}, ctx, cancel
}

// stale is a max_stale that few requests have.
func (w *worker) stale(c *call) *durationpb.Duration {
	if w.r.IntN(8) > 0 {
		return nil
	}
	d := []time.Duration{0, 500 * time.Millisecond, 2 * time.Second, 10 * time.Second}[w.r.IntN(4)]
	c.MaxStale = &d
	return durationpb.New(d)
}

func (w *worker) encrypt() {
	c, ctx, cancel := w.begin("encrypt", w.key())
	defer cancel()
	w.encryptIn(ctx, c)
}

// encryptIn encrypts in a call that has begun.
func (w *worker) encryptIn(ctx context.Context, c *call) {
	plaintext := w.payload()
	c.Uses = []use{{Key: c.Key, Encrypt: true}}
	a, err := w.c.Encrypt(ctx, &client.EncryptRequest{Key: c.Key, Plaintext: plaintext, MaxStale: w.stale(c), Context: map[string]string{"of": w.name}})
	if err == nil {
		c.Uses[0] = w.rec.useOf(a.GetKeyUse(), true, edksOf(a.GetMessage()))
		c.Message = messageID(a.GetMessage())
		w.kept.add(message{c.Key, a.GetMessage(), plaintext})
	}
	w.rec.done(c, err)
}

func (w *worker) decrypt() {
	m, ok := w.kept.pick(w.r, w.may)
	if !ok {
		return
	}
	c, ctx, cancel := w.begin("decrypt", m.key)
	defer cancel()
	w.decryptIn(ctx, c, m)
}

func (w *worker) decryptIn(ctx context.Context, c *call, m message) {
	c.Uses = []use{w.rec.asked(m.key, m.sealed)}
	a, err := w.c.Decrypt(ctx, &client.DecryptRequest{Message: m.sealed, MaxStale: w.stale(c)})
	if err == nil {
		c.Uses[0] = w.rec.useOf(a.GetKeyUse(), false, edksOf(m.sealed))
		c.Wrong = differs(a.GetPlaintext(), m.plaintext)
	}
	w.rec.done(c, err)
}

// asked is what a request for a message needs.
func (r *recorder) asked(key string, sealed []byte) use {
	u := use{Key: key}
	u.Wraps, u.EDKs = r.wrapsOf(edksOf(sealed))
	return u
}

func differs(got, want []byte) string {
	if bytes.Equal(got, want) {
		return ""
	}
	return fmt.Sprintf("it opened to something else: %d bytes, want %d", len(got), len(want))
}

func (w *worker) reencrypt() {
	m, ok := w.kept.pick(w.r, w.may)
	if !ok {
		return
	}
	to := w.key()
	c, ctx, cancel := w.begin("reencrypt", m.key)
	defer cancel()
	c.Uses = []use{w.rec.asked(m.key, m.sealed), {Key: to, Encrypt: true}}
	a, err := w.c.ReEncrypt(ctx, &client.ReEncryptRequest{Message: m.sealed, DestinationKey: to})
	if err == nil {
		c.Uses = []use{w.rec.useOf(a.GetSource(), false, edksOf(m.sealed)), w.rec.useOf(a.GetDestination(), true, edksOf(a.GetMessage()))}
		c.Message = messageID(a.GetMessage())
		w.kept.add(message{to, a.GetMessage(), m.plaintext})
	}
	w.rec.done(c, err)
}

// stream encrypts and decrypts some frames.
func (w *worker) stream() {
	c, ctx, cancel := w.begin("encrypt-stream", w.key())
	defer cancel()
	plaintext := bytes.Repeat(w.payload(), 200)
	c.Uses = []use{{Key: c.Key, Encrypt: true}}
	var sealed, opened bytes.Buffer
	k, err := w.c.EncryptStream(ctx, &client.EncryptStreamStart{Key: c.Key, Context: map[string]string{"of": w.name}}, bytes.NewReader(plaintext), &sealed)
	if err == nil {
		c.Uses[0] = w.rec.useOf(k, true, edksOf(sealed.Bytes()))
		c.Message = messageID(sealed.Bytes())
		w.kept.addStream(message{c.Key, sealed.Bytes(), plaintext})
	}
	if w.rec.done(c, err); err != nil {
		return
	}
	c, ctx, cancel = w.begin("decrypt-stream", c.Key)
	defer cancel()
	c.Uses = []use{w.rec.asked(c.Key, sealed.Bytes())}
	h, err := w.c.DecryptStream(ctx, &client.DecryptStreamStart{}, bytes.NewReader(sealed.Bytes()), &opened)
	if err == nil {
		c.Uses[0] = w.rec.useOf(h.GetKeyUse(), false, edksOf(sealed.Bytes()))
		c.Wrong = differs(opened.Bytes(), plaintext)
	}
	w.rec.done(c, err)
}

func (w *worker) generate() {
	if w.name == "bob" {
		return // it is not his
	}
	c, ctx, cancel := w.begin("generate-data-key", w.key())
	defer cancel()
	c.Uses = []use{{Key: c.Key, Encrypt: true}}
	a, err := w.c.GenerateDataKey(ctx, &client.GenerateDataKeyRequest{Key: c.Key, MaxStale: w.stale(c)})
	if err == nil {
		c.Uses[0] = w.rec.useOf(a.GetKeyUse(), true, edkOf(a.GetEncryptedDataKey()))
		w.kept.addKey(exported{key: c.Key, edk: a.GetEncryptedDataKey(), plaintext: a.GetPlaintext()})
	}
	w.rec.done(c, err)
}

func (w *worker) decryptKey() {
	e, ok := w.kept.pickKey(w.r, false)
	if !ok || w.name == "bob" {
		return
	}
	c, ctx, cancel := w.begin("decrypt-data-key", e.key)
	defer cancel()
	w.decryptKeyIn(ctx, c, e)
}

func (w *worker) decryptKeyIn(ctx context.Context, c *call, e exported) {
	c.Uses = []use{w.rec.askedKey(e)}
	a, err := w.c.DecryptDataKey(ctx, &client.DecryptDataKeyRequest{EncryptedDataKey: e.edk, MaxStale: w.stale(c)})
	if err == nil {
		c.Uses[0] = w.rec.useOf(a.GetKeyUse(), false, edkOf(e.edk))
		c.Wrong = differs(a.GetPlaintext(), e.plaintext)
	}
	w.rec.done(c, err)
}

func (r *recorder) askedKey(e exported) use {
	u := use{Key: e.key}
	u.Wraps, u.EDKs = r.wrapsOf(edkOf(e.edk))
	return u
}

func (w *worker) wrap() {
	if w.name == "bob" {
		return
	}
	c, ctx, cancel := w.begin("wrap", w.key())
	defer cancel()
	c.Uses = []use{{Key: c.Key, Encrypt: true}}
	material := w.payload()
	a, err := w.c.Wrap(ctx, &client.WrapRequest{Key: c.Key, Plaintext: material})
	if err == nil {
		c.Uses[0] = w.rec.useOf(a.GetKeyUse(), true, edkOf(a.GetWrapped()))
		w.kept.addKey(exported{c.Key, a.GetWrapped(), material, true})
	}
	w.rec.done(c, err)
}

func (w *worker) unwrap() {
	e, ok := w.kept.pickKey(w.r, true)
	if !ok || w.name == "bob" {
		return
	}
	c, ctx, cancel := w.begin("unwrap", e.key)
	defer cancel()
	w.unwrapIn(ctx, c, e)
}

func (w *worker) unwrapIn(ctx context.Context, c *call, e exported) {
	c.Uses = []use{w.rec.askedKey(e)}
	a, err := w.c.Unwrap(ctx, &client.UnwrapRequest{Wrapped: e.edk})
	if err == nil {
		c.Uses[0] = w.rec.useOf(a.GetKeyUse(), false, edkOf(e.edk))
		c.Wrong = differs(a.GetPlaintext(), e.plaintext)
	}
	w.rec.done(c, err)
}
