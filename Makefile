SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

GO       ?= go
TOOL     := $(GO) tool -modfile=$(CURDIR)/tools/go.mod
LDFLAGS  := -s -w
# Release builds erase secrets from stacks and registers where Go can.
RELEASE  := CGO_ENABLED=0 GOEXPERIMENT=runtimesecret
FUZZTIME ?= 30s
SOAKTIME ?= 10m
CHAOS_TIME ?= 10m
COUNT    ?= 5
# Examples with dependencies that the agent's own module must not have.
EXAMPLES := examples/rows
each_example = set -e; for dir in $(EXAMPLES); do (cd $$dir && $(1)); done

.PHONY: build build-fips build-hsm drill quickstart quickstart-hsm test test-fips test-hsm-all race lint generate generate-check fmt-check vet tidy-check check fuzz soak chaos bench interop deps clean help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

build: ## build bin/kms-agent
	$(RELEASE) $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/kms-agent

build-fips: ## build bin/fips/kms-agent with the certified FIPS 140-3 module
	$(RELEASE) GOFIPS140=certified $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/fips/ ./cmd/kms-agent

build-hsm: build ## build bin/kms-agent-pkcs11, the backend for HSMs; needs a C compiler
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/kms-agent-pkcs11 ./plugins/pkcs11

quickstart-hsm: build-hsm deps ## see it work with an HSM: SoftHSM, in a private directory
	@scripts/quickstart-hsm

drill: build ## see what an outage and a revocation look like, on a key of its own
	@scripts/drill

quickstart: build ## see it work: encrypt, decrypt, a refusal, the audit trail
	@scripts/quickstart

deps: ## install what the tests need
	@scripts/setup-test-deps

test: deps ## run every test
	$(GO) test -timeout 9m ./...
	@$(call each_example,$(GO) test -timeout 5m ./...)

race: deps ## run every test under the race detector
	$(GO) test -race -timeout 20m ./...
	@$(call each_example,$(GO) test -race -timeout 10m ./...)

test-fips: deps ## run every test on the certified module, with what is not approved refused
	GOFIPS140=certified GODEBUG=fips140=only $(GO) test -timeout 15m ./...

test-hsm-all: deps ## the HSM tests on every module that Debian has, not SoftHSM alone; as root
	@scripts/setup-hsm-modules
	$(GO) test -tags hsmall -timeout 20m ./hsm/... ./plugins/pkcs11/...

interop: deps ## messages against another implementation, at length
	INTEROP=full $(GO) test -count=1 -timeout 20m ./test/interop/...

soak: ## mixed load, honest and hostile, for SOAKTIME; fails where the agent grows
	SOAK=$(SOAKTIME) $(GO) test -count=1 -v -timeout 0 ./test/soak

chaos: deps ## an agent whose backends, plugins, tokens and lines fail, for CHAOS_TIME; CHAOS_SEED replays
	@CHAOS_TIME=$(CHAOS_TIME) CHAOS_SEED=$${CHAOS_SEED:-$$(( $$(date +%s) % 1000000 ))} CHAOS_DIR=$(CURDIR)/bin/chaos \
		$(GO) test -count=1 -v -timeout 0 -run 'TestChaos$$' ./test/chaos

lint: ## golangci-lint
	$(TOOL) golangci-lint run ./...
	@$(call each_example,$(TOOL) golangci-lint run ./...)

vet:
	$(GO) vet ./...
	@$(call each_example,$(GO) vet ./...)

fmt-check:
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "gofmt these: $$out"; exit 1; }

generate: ## regenerate api/ from the .proto files
	$(TOOL) buf generate

generate-check: ## fail when api/ is not what the .proto files make
	@scripts/generate-check

tidy-check:
	$(GO) mod tidy -diff
	@$(call each_example,$(GO) mod tidy -diff)

check: fmt-check vet tidy-check generate-check lint test race ## all that must pass before a commit

fuzz: ## fuzz every target for FUZZTIME
	@scripts/fuzz $(FUZZTIME)

bench: build ## benchmarks, medians of COUNT runs
	@scripts/bench $(COUNT)

clean:
	rm -rf bin
