# The README's commands. Each makes what it needs in .venv once; a second run installs nothing.
#   ARGS="..."        options for the command: make demo ARGS="--help", make test ARGS="-k expand"
#   PYTHON=...        the interpreter that makes .venv; the first of 3.10 to 3.13 on the PATH unless given
#   TORCH_BACKEND=... the torch build to install: cpu, cu130, rocm7.1, ... or auto, what this machine's GPU needs;
#                     empty takes pip's choice. Unless given: auto if there is a GPU, else empty
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
    $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
NVIDIA := $(shell command -v nvidia-smi 2>/dev/null)
AMD := $(if $(NVIDIA),,$(shell command -v rocm_agent_enumerator 2>/dev/null))
TORCH_BACKEND ?= $(if $(NVIDIA)$(AMD),auto)

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

demo: $(VENV)/.installed-cli  ## Fine-tune the experts of a small language model with fixed, grown and learned ranks
	$(BIN)/lrlora demo $(ARGS)

test: $(VENV)/.installed-test  ## Run all tests that this machine can run
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## Build the documentation site into site/; a link that leads nowhere is an error
	@test -x $(BIN)/zensical || { echo "make docs needs Python 3.11 or later; $(VENV) has an older one" >&2; exit 1; }
	$(BIN)/zensical build --clean --strict $(ARGS)

bench: $(VENV)/.installed-bench  ## Time this library beside its peers
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

static: $(VENV)/.installed-bench  ## Compile every kernel for four GPU targets and report on the code; needs no GPU
	$(BIN)/python -m benchmarks.static $(ARGS)

gpu:  ## On a GPU, in ten minutes: parity tests, benchmarks, docs/performance.md; uses the first Python whose torch sees it
	@python=$$(for python in $(BIN)/python python3; do \
	    $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && echo $$python && break; done); \
	test -n "$$python" || { echo "make gpu: neither $(BIN)/python nor python3 has a torch that sees a GPU;" \
	    "on a machine with one, make test installs it" >&2; exit 1; }; \
	set -x; PYTHONPATH=. PYTHONUNBUFFERED=1 $$python -m benchmarks.gpu $(ARGS)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 on the PATH: install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "$(PYTHON) cannot make a virtual environment:" \
	    "on Debian or Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# uv knows which build of torch a GPU needs. A ROCm build brings a triton of its own under another distribution name,
# which the plain one would overwrite.
ifneq ($(TORCH_BACKEND),)
INSTALL = $(BIN)/python -m pip install uv \
    && echo $(if $(filter rocm% $(if $(AMD),auto),$(TORCH_BACKEND)),triton) \
    | $(BIN)/uv pip install --python $(BIN)/python --torch-backend $(TORCH_BACKEND) --excludes -
else
INSTALL = $(BIN)/python -m pip install --no-compile
endif

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --constraint constraints.txt --editable '.[$*]'
	@touch $@

.PHONY: help demo test lint docs bench static gpu
