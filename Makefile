# make run     set up .venv and serve the default model over gRPC
# make gateway  two workers on this machine behind one OpenAI and Anthropic endpoint (docs/gateway.md)
# make test    set up .venv and run every check: ruff, pyright, import contracts, tests
# make test-all       every check with property tests of 20 times as many cases, drawn anew, and the tests marked `long`
# make gpu-compiler    what .venv needs to compile for a GPU that is not here (python -m jaxserve.compile --target h200)
#
#   PYTHON=python3.12      the Python that makes the environment (3.11 or newer)
#   VENV=.venv-312         where the environment stands; a second one does not disturb the first
#   JAX_VERSION=0.11.2     pins jax; without it the newest jax that pyproject.toml and the Python allow
#   CONFIG=llama.gin       what `make run` and `make gateway` serve; ARGS="--gin.BINDING=VALUE ..." is handed on
#   WORKERS=2              processes that run the tests at once; 0 runs them in pytest's own
#   PYTEST_ARGS="-k page"  handed on to pytest

PYTHON ?= python3
VENV ?= .venv
JAX_VERSION ?=
CONFIG ?= tiny.gin
ARGS ?=
WORKERS ?= 2
PYTEST_ARGS ?=

# The reference in parity tests. Only builds for the CPU: on Linux the plain torch wheel pulls gigabytes of CUDA, while
# one marked +cpu is found only where pip is configured with an index that has it. Without torch the parity tests
# compare with recorded numbers.
TORCH_VERSION := 2.13.0
TORCH := torch==$(TORCH_VERSION)$(if $(filter Linux,$(shell uname -s)),+cpu)

# The gateway has an environment of its own: what it needs is not ours to choose.
SMG := smg==1.13.0
SMG_VENV := .venv-gateway

PROTOC := grpcio-tools==1.80.0

define INSTALL_GPU_COMPILER
@jax=$$($(BIN)/python -c 'import importlib.metadata; print(importlib.metadata.version("jax"))') && \
case "$$jax" in \
    0.10.*) cuda=cuda12 toolkit='$(CUDA12_TOOLKIT)';; \
    *) cuda=cuda13 toolkit='$(CUDA13_TOOLKIT)';; \
esac && \
wanted="jax-$$cuda-plugin==$$jax jax-$$cuda-pjrt==$$jax $$toolkit" && \
if [ "$$(cat $(VENV)/gpu-compiler/.installed 2>/dev/null)" != "$$wanted" ]; then \
    echo "Installing $$wanted into $(VENV)/gpu-compiler" && \
    rm -rf $(VENV)/gpu-compiler && \
    $(PIP_INSTALL) --no-deps --only-binary :all: --target $(VENV)/gpu-compiler $$wanted && \
    echo "$$wanted" > $(VENV)/gpu-compiler/.installed; \
fi
endef

BIN := $(VENV)/bin
# Byte code is written on first import: compiling every installed file at once would double the time of the set-up.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
JAX_PIN := $(if $(JAX_VERSION),jax==$(JAX_VERSION))
RUN_STAMP := $(VENV)/.installed-run-$(or $(JAX_VERSION),newest)
GATEWAY_STAMP := $(VENV)/.installed-gateway-$(or $(JAX_VERSION),newest)
TEST_STAMP := $(VENV)/.installed-test-$(or $(JAX_VERSION),newest)

# XLA's compiler for GPUs is jax's CUDA plugin of the same version; with it CUDA's assembler and device library, pinned:
# registers and spills depend on the assembler. Apart from the environment's packages, because jax starts every plugin
# that it finds there. CUDA's own libraries, which running needs, are not installed.
CUDA12_TOOLKIT := nvidia-cuda-nvcc-cu12==12.9.86
CUDA13_TOOLKIT := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88

.DEFAULT_GOAL := help
.PHONY: help run gateway test test-all lint format pytest venv gpu-compiler protos clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

run: $(RUN_STAMP)
	$(BIN)/python -m jaxserve.server --config $(CONFIG) $(ARGS)

gateway: $(GATEWAY_STAMP) $(SMG_VENV)/bin/smg
	$(BIN)/python -m jaxserve.serving.deploy.gateway --smg $(SMG_VENV)/bin/smg --config $(CONFIG) $(ARGS)

test: lint pytest

test-all: export JAXSERVE_TEST_ALL = 1
test-all: PYTEST_ARGS += --timeout=3600
test-all: lint pytest

lint: $(TEST_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

pytest: $(TEST_STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

venv: $(TEST_STAMP)

gpu-compiler: $(RUN_STAMP)
	$(INSTALL_GPU_COMPILER)

# The generated files are committed: running and testing need no compiler. It is an old one on purpose, in an environment
# of its own: generated code refuses a grpcio or protobuf older than its compiler's (lower bounds in pyproject.toml).
protos:
	$(MAKE) .venv-protos/bin/python VENV=.venv-protos
	.venv-protos/bin/python -m pip --disable-pip-version-check install -q $(PROTOC)
	.venv-protos/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
	    $$(find jaxserve/serving/protos/ -name '*.proto' | sort)

clean:
	rm -rf $(VENV) $(VENV)-protos $(SMG_VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no '$(PYTHON)' here; name a Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("jaxserve needs Python 3.11 or newer and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(RUN_STAMP): pyproject.toml | $(BIN)/python
	@echo "Installing jaxserve and what it needs into $(VENV); a minute or two"
	$(PIP_INSTALL) -e . $(JAX_PIN)
	@touch $@

$(GATEWAY_STAMP): pyproject.toml | $(BIN)/python
	@echo "Installing jaxserve, what it needs and what gateways speak into $(VENV); a minute or two"
	$(PIP_INSTALL) -e '.[gateway]' $(JAX_PIN)
	@touch $@

$(SMG_VENV)/bin/smg:
	$(MAKE) $(SMG_VENV)/bin/python VENV=$(SMG_VENV)
	$(SMG_VENV)/bin/python -m pip --disable-pip-version-check install -q $(SMG)

$(TEST_STAMP): pyproject.toml | $(BIN)/python
	@echo "Installing jaxserve, what it needs and its test tools into $(VENV); a minute or two"
	$(PIP_INSTALL) -e '.[test]' $(JAX_PIN)
	@if out=$$($(PIP_INSTALL) --only-binary :all: '$(TORCH)' 2>&1); then \
	    echo "Installed $(TORCH): parity tests compare with torch itself"; \
	else \
	    case "$$out" in *"No matching distribution"*) ;; *) echo "$$out" >&2;; esac; \
	    echo "No $(TORCH) for this Python: parity tests compare with recorded numbers"; \
	fi
	$(INSTALL_GPU_COMPILER) || echo "No GPU compiler: tests that compile for a GPU will fail" >&2
	@touch $@
