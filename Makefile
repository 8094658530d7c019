# Thin: each target is one or two commands. `make demo` and `make test` are all a new user needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Arguments of pip for torch, installed before all else. With CUDA, `SYSTEM_TORCH=1 make …` keeps the torch you have.
TORCH  ?= torch==2.13.0

.PHONY: setup demo test test-all bench evidence lab notebooks readme docs clean

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("stan_nb needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(if $(SYSTEM_TORCH),$(BIN)/python -c 'import torch; print("keeping torch", torch.__version__)',$(BIN)/python -m pip install -q $(TORCH))
	$(BIN)/python -m pip install -q -e '.[dev,docs,diffusion]'
	@touch $(READY)

demo: $(READY)       ## adapt a real pretrained encoder with LoRA and with STAN; table, adapters, report
	$(BIN)/stan-nb demo

test: $(READY)       ## every test: notebooks in sync, clean and running, then pytest
	$(BIN)/nbdev-test --n-workers 2 --do-print --timing
	$(BIN)/python -m pytest tests

test-all: $(READY)   ## the same with the long counts
	$(BIN)/nbdev-test --n-workers 2 --do-print --timing
	$(BIN)/python -m pytest tests -m "slow or not slow"

bench: $(READY)      ## STAN beside LoRA on this CPU: the ratio tables, under 6 minutes
	$(BIN)/python benchmarks/cpu.py

evidence: $(READY)   ## everything that is stored rather than made live: results files, and the adapter that comes with the package
	$(BIN)/python benchmarks/tune_text.py
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/compile_kernels.py
	$(BIN)/python benchmarks/efficiency.py
	$(BIN)/stan-nb demo --overwrite --out runs/evidence
	cp runs/evidence/results.json stan_nb/data/results/text_demo.json
	rm -rf stan_nb/data/runs/minilm-docstrings && cp -r runs/evidence/stan-0 stan_nb/data/runs/minilm-docstrings

lab: $(READY)        ## open the course in JupyterLab
	$(BIN)/jupyter lab nbs

notebooks: $(READY)  ## run the lessons in order and store their outputs
	$(BIN)/python docs/store.py

readme: $(READY)     ## README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

docs: $(READY)       ## the lessons as a site in docs/_build
	$(BIN)/sphinx-build -q -c docs nbs docs/_build

clean:
	rm -rf docs/_build dist build .pytest_cache .hypothesis
