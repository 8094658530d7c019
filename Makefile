# Thin: each target is one or two commands. `make demo` and `make test` are all a new user needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Arguments of pip for torch, installed before all else. With CUDA, `SYSTEM_TORCH=1 make …` keeps the torch you have.
TORCH  ?= torch==2.13.0
# What the site serves itself: MathJax and its fonts, from npm.
MATHJAX := docs/_vendor/mathjax/tex-chtml.js

.PHONY: setup demo test test-all bench evidence verify lab notebooks readme docs docs-serve clean

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
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --do-print --timing
	$(BIN)/python -m pytest tests

test-all: $(READY)   ## the same with the long counts
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --do-print --timing
	$(BIN)/python -m pytest tests -m "slow or not slow"

bench: $(READY)      ## STAN beside LoRA on this CPU: the ratio tables, under 6 minutes
	$(BIN)/python benchmarks/cpu.py

evidence: $(READY)   ## everything that is stored rather than made live: results files, each by the command it names, and the adapter that comes with the package
	$(BIN)/stan-nb evidence
	rm -rf stan_nb/data/runs/minilm-docstrings && cp -r runs/evidence/stan-0 stan_nb/data/runs/minilm-docstrings
	$(BIN)/stan-nb train math_code --task expressions --overwrite --out stan_nb/data/runs/math_code-expressions
	$(BIN)/stan-nb train math_code --method lora --overwrite --out stan_nb/data/runs/math_code-words-lora
	$(BIN)/stan-nb train diffusion --overwrite --out runs/evidence/digits-stan
	rm -rf stan_nb/data/runs/digits-stan && mkdir stan_nb/data/runs/digits-stan && cp -r runs/evidence/digits-stan/run.json runs/evidence/digits-stan/adapter stan_nb/data/runs/digits-stan

verify: $(READY)     ## run a random tenth of the stored results again and compare
	$(BIN)/stan-nb verify

lab: $(READY)        ## open the course in JupyterLab
	$(BIN)/jupyter lab nbs

notebooks: $(READY)  ## run the lessons in order and store their outputs
	$(BIN)/python docs/store.py

readme: $(READY)     ## README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

docs: $(READY) $(MATHJAX) ## the lessons as a site in docs/_build/html
	$(BIN)/python docs/bridge.py
	$(BIN)/sphinx-build -n -W --keep-going -q -c docs -d docs/_build/doctrees docs/_src docs/_build/html

docs-serve: docs     ## the site at http://localhost:8000
	$(BIN)/python -m http.server --directory docs/_build/html 8000

$(MATHJAX): docs/package-lock.json
	npm ci --prefix docs --no-audit --no-fund --silent
	@mkdir -p docs/_vendor/mathjax/fonts/mathjax-newcm-font docs/_vendor/mathjax/input/tex
	cd docs/node_modules && cp -r mathjax/a11y mathjax/tex-chtml.js ../_vendor/mathjax && cp -r mathjax/input/tex/extensions ../_vendor/mathjax/input/tex
	cp -r docs/node_modules/@mathjax/mathjax-newcm-font/chtml docs/_vendor/mathjax/fonts/mathjax-newcm-font
	@touch $@

clean:
	rm -rf docs/_build docs/_src docs/_vendor docs/node_modules dist build .pytest_cache .hypothesis
