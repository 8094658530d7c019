# Thin: each target is one or two commands. `make demo` and `make test` are all a new user needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# The CPU build of this release is small; with CUDA use SYSTEM_TORCH=1 to keep the torch you have.
TORCH  ?= torch==2.13.0

.PHONY: setup demo test test-all lab notebooks readme docs clean

setup: $(READY)

$(READY): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stan_nb needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(if $(SYSTEM_TORCH),$(BIN)/python -c 'import torch; print("keeping torch", torch.__version__)',$(BIN)/python -m pip install -q '$(TORCH)')
	$(BIN)/python -m pip install -q -e '.[dev,docs,diffusion]'
	touch $(READY)

demo: $(READY)
	$(BIN)/stan-nb demo

test: $(READY)
	$(BIN)/python -m pytest tests

test-all: $(READY)
	$(BIN)/python -m pytest tests -m "slow or not slow"

lab: $(READY)
	$(BIN)/jupyter lab nbs

clean:
	rm -rf _proc _docs docs/_build dist build .pytest_cache .hypothesis
