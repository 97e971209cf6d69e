package cache_test

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/cache"
)

// BenchmarkHit is one use of a cached data key, on 16 goroutines for each CPU.
func BenchmarkHit(b *testing.B) {
	c, err := cache.New(cache.Config{
		Now: bootTime, MaxEntries: 1000,
		Classify: func(error) cache.Verdict { return cache.Other },
		Confirm:  func(context.Context, cache.Authority, any) error { return nil },
	})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	limits := cache.Limits{MaxAge: time.Hour, MaxLifetime: time.Hour, MaxIdle: time.Hour, MaxMessages: 1 << 32, MaxBytes: 1 << 60}
	fill := func(context.Context) (cache.Material, error) {
		return cache.Material{DataKey: make([]byte, cache.DataKeySize)}, nil
	}
	authority := cache.Authority{Backend: "hsm-1", WrappingKey: "pkcs11:object=orders;type=secret-key", Version: "3"}
	b.Run("encrypt", func(b *testing.B) {
		a := authority
		a.Direction = cache.Encrypt
		r := cache.EncryptRequest{
			Caller: "spiffe://example.org/ns/shop/sa/orders", Limits: limits, Bytes: 100, Fill: fill,
			Slot: cache.Slot{Key: "orders", Authority: a, Partition: "cspiffe://example.org/ns/shop/sa/orders"},
		}
		b.ReportAllocs()
		b.SetParallelism(16)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				use, err := c.Encrypt(context.Background(), r)
				if err != nil {
					b.Error(err)
					return
				}
				use.Release()
			}
		})
	})
	b.Run("decrypt", func(b *testing.B) {
		a := authority
		a.Direction = cache.Decrypt
		r := cache.DecryptRequest{
			Caller: "spiffe://example.org/ns/shop/sa/orders", Limits: limits, Fill: fill,
			Key: "orders", Authority: a, ID: cache.DecryptID{1},
		}
		b.ReportAllocs()
		b.SetParallelism(16)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				use, err := c.Decrypt(context.Background(), r)
				if err != nil {
					b.Error(err)
					return
				}
				use.Release()
			}
		})
	})
}

func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}
