# Targets for users and developers. Each installs what it needs into .venv. You need Python and make.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)

# Data for the tests. A test whose data is missing is skipped and says why.
export BARDLET_DATA ?= $(wildcard $(abspath ../shared/data))
# A real small model for the slow tests; CONTRIBUTING.md says how to make its folder.
export BARDLET_SMOLLM2 ?= $(wildcard $(abspath .smollm2))

# Pretend that the processor has only AVX2, like an older laptop: no AVX-512, no native bf16.
AVX2 := CUDA_VISIBLE_DEVICES= ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

# Programs for the tests of exports and of the server, which `make engines` installs. A test whose program is missing is skipped.
ENGINES := $(abspath .engines)
PACKAGES := transformers-4 peft serve lm-eval schemathesis
WITH_ENGINES := BARDLET_NODE_MODULES=$(ENGINES)/node_modules BARDLET_AXE=$(ENGINES)/node_modules/axe-core/axe.min.js \
  BARDLET_TRANSFORMERS_4=$(ENGINES)/transformers-4 BARDLET_PEFT=$(ENGINES)/peft BARDLET_SERVE=$(ENGINES)/serve \
  BARDLET_LM_EVAL=$(ENGINES)/lm-eval BARDLET_SCHEMATHESIS=$(ENGINES)/schemathesis

PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-avx2 accept engines engines-installed lint install lock docs notebooks clean

demo: $(VENV)/ready          ## train a GPT on Shakespeare for about two minutes, and print a sample
	$(BIN)/bardlet train --config configs/demo.toml
	@echo 'to use the command bardlet in this terminal, run: source $(BIN)/activate'

test: $(VENV)/ready-test     ## all quick tests
	$(BIN)/python -m pytest $(PARALLEL)

test-avx2: $(VENV)/ready-test ## the same tests, as on a processor with only AVX2
	@$(AVX2) $(BIN)/bardlet doctor | grep -E 'precision.*fp32: .*native bf16'
	$(AVX2) $(BIN)/python -m pytest $(PARALLEL)

accept: $(VENV)/ready-test $(VENV)/ready-docs  ## slow tests on real text, and the course
	$(if $(wildcard $(ENGINES)/ready),$(WITH_ENGINES)) $(BIN)/python -m pytest --override-ini addopts= -q -x tests/acceptance

engines: engines-installed   ## install other engines into .engines, and compare each with bardlet; BARDLET_ENGINES=FILE adds lines to FILE
	$(WITH_ENGINES) $(BIN)/python -m pytest --override-ini addopts= -q $(addprefix tests/acceptance/test_,engines.py \
	  hugging_face_tools.py gguf_loss.py page_in_browser.py server_clients.py server_schema.py)

engines-installed: $(ENGINES)/node_modules/ready $(PACKAGES:%=$(ENGINES)/%/ready)
	@touch $(ENGINES)/ready

$(ENGINES)/node_modules/ready: tests/acceptance/engines/node.txt
	@command -v npm >/dev/null || { echo 'npm is missing: install Node.js 20 or newer, then call make again'; exit 1; }
	npm install --prefix $(ENGINES) --ignore-scripts --no-audit --no-fund --loglevel error $(shell cat $(firstword $<))
	@touch $@

# A folder each, with what .venv lacks: the versions would not fit into one environment.
$(ENGINES)/%/ready: tests/acceptance/engines/%.txt $(VENV)/ready-test
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) -r $<
	@touch $@

lint: $(VENV)/ready-test     ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# NO_MKDOCS_2_WARNING silences a notice of Material for MkDocs, which appears at every build.
docs: $(VENV)/ready-docs     ## build the course: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(VENV)/ready     ## write notebooks/*.ipynb from their sources and the course's pages
	$(BIN)/python docs/notebooks.py

install: $(VENV)/ready-test  ## install bardlet and the tools for the tests
	@echo 'bardlet is installed in $(VENV); run: source $(BIN)/activate'

# Empty files in .venv record what is installed: made (the environment), torch, ready (bardlet), ready-test and
# ready-docs (its extras).
$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit("bardlet needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": name another with make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: install it (Debian, Ubuntu: apt install python3-venv), then call make again"; exit 1; }
	@echo 'installing into $(VENV): a few minutes the first time, mostly PyTorch'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Without an NVIDIA GPU, install the CPU build of torch, which is a tenth of the size, if pip can find it.
$(VENV)/torch: $(VENV)/made constraints.txt
	@if nvidia-smi -L >/dev/null 2>&1 || ! $(BIN)/python -m pip install --quiet 'torch==$(TORCH)+cpu' -c constraints.txt 2>/dev/null; then \
	  echo "installing torch $(TORCH) from the package index"; \
	  $(BIN)/python -m pip install --quiet 'torch==$(TORCH)' -c constraints.txt; fi
	@touch $@

$(VENV)/ready: $(VENV)/torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/ready-test: $(VENV)/torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/ready

$(VENV)/ready-docs: $(VENV)/torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/ready

lock: $(VENV)/ready-test $(VENV)/ready-docs  ## write the installed versions to constraints.txt
	@{ echo '# The versions that `make` installs and that the tests pass with. Written by `make lock`.'; \
	   echo 'torch==$(TORCH)'; \
	   $(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(torch|nvidia.*|triton|cuda.*|pip|setuptools)([=~ ]|$$)'; } > constraints.new
	@mv constraints.new constraints.txt

clean:                       ## remove the environment and the tools' caches, but no runs
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
