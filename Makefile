# Everything starts here, on a bare Debian machine with Python 3.11+ and a C++ compiler:
#   make up      set up what is missing, then run the local cluster in the foreground
#   make test    set up what is missing, then run every check
# Set-up is edge_llm/bootstrap.py; it does nothing when there is nothing to do.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP = $(PYTHON) -I edge_llm/bootstrap.py

.PHONY: help up test lint types unit verify lock reference-tools setup setup-dev clean manifests manifests-check test-cluster \
	agreement image image-base

help:
	@echo "make up               set up, then run a local cluster (ARGS='--port 9000' passes options on)"
	@echo "make test             set up, then run every check"
	@echo "make verify           measure on this machine how exact this build is (ARGS='--model NAME')"
	@echo "make reference-tools  build llama.cpp's own tools to compare with"
	@echo "make agreement        bench serve beside a client that shares no code with it, at a llama-server (10 minutes)"
	@echo "make test-cluster     a real Kubernetes of three nodes on this machine, as root, and everything tried on it (30 minutes)"
	@echo "make manifests        write the version and install.yaml into k3s_manifests"
	@echo "make manifests-check  checkov's policies on every overlay (installs 290 MB once)"
	@echo "make image            the container image into dist (ARCH=arm64, BASE=..., ARGS='--builder podman')"
	@echo "make image-base       a base image by debootstrap, where no image registry can be reached (as root)"
	@echo "make lock             resolve pyproject.toml again into the lock files"
	@echo "make clean            remove the environment and caches of this folder (not the user's cache)"

setup:
	@$(SETUP)

setup-dev:
	@$(SETUP) --dev

up: setup
	@exec $(BIN)/edge-llm up $(ARGS)

test: setup-dev lint types unit

lint:
	$(BIN)/ruff check edge_llm tests
	$(BIN)/ruff format --check edge_llm tests
	$(BIN)/lint-imports

types:
	$(BIN)/mypy --strict edge_llm tests

unit:
	$(BIN)/pytest $(ARGS)

verify: setup
	$(BIN)/edge-llm verify $(ARGS)

reference-tools: setup
	$(BIN)/edge-llm bench reference-tools

# What `make test` compares with: the version in the manifests, and install.yaml.
manifests: setup-dev
	$(BIN)/python -m tests.manifests.rendering

# A measurement: nothing else should run meanwhile. Needs reference-tools.
agreement: setup-dev
	$(BIN)/python -m tests.bench.agreement $(ARGS)

# Builds Kubernetes from Go modules once (10 minutes); says what this machine lacks, --install fetches that by apt.
test-cluster: setup-dev
	$(BIN)/python -m tests.kubernetes $(ARGS)

# 290 MB of checkov in an environment of its own, so not part of `make test`.
CHECKOV ?= .venv-checkov
manifests-check: setup-dev
	@test -x $(CHECKOV)/bin/checkov || { $(PYTHON) -m venv $(CHECKOV) && \
		$(CHECKOV)/bin/pip install --quiet --require-hashes -r tests/manifests/checkov.lock; }
	rm -rf dist/manifests
	$(BIN)/python -m tests.manifests.rendering dist/manifests
	$(CHECKOV)/bin/checkov --config-file tests/manifests/checkov.yaml --directory dist/manifests

# Needs buildah or podman, no set-up. arm64 on x86-64: cross-compiled; qemu-user-static runs Debian's own scripts only.
IMAGE = $(PYTHON) -B -m edge_llm.image.build $(if $(ARCH),--arch $(ARCH)) $(if $(BASE),--base $(BASE)) $(ARGS)

image:
	@$(IMAGE)

image-base:
	@$(IMAGE) --make-base

# The files name no index: whoever installs uses an index of their own, the hashes say whether it gave the right bytes.
COMPILE = $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-emit-find-links \
	--custom-compile-command "make lock"
LOCK = $(COMPILE) pyproject.toml --extra setup

lock: setup-dev
	$(LOCK) --output-file requirements.lock
	$(LOCK) --extra dev --constraint requirements.lock --output-file requirements-dev.lock
	$(COMPILE) --python-version 3.11 edge_llm/image/build.in --constraint requirements.lock \
		--output-file edge_llm/image/build.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	find edge_llm tests -name __pycache__ -type d -prune -exec rm -rf {} +
