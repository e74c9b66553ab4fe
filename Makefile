# bardlet's commands. Each sets up what it needs in .venv; all that a fresh machine must have is Python and make.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)

# text for the tests: where there is none they skip, with a reason
export BARDLET_DATA ?= $(wildcard $(abspath ../shared/data))

# as if this processor had AVX2 alone, as a laptop of some years ago: no AVX-512, no native bf16
AVX2 := CUDA_VISIBLE_DEVICES= ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-avx2 accept lint install lock docs clean

demo: $(VENV)/ready          ## train a GPT on Shakespeare for about two minutes, and let it write
	$(BIN)/bardlet train --config configs/demo.toml
	@echo 'to type bardlet yourself, first run: source $(BIN)/activate'

test: $(VENV)/ready-test     ## all quick tests
	$(BIN)/python -m pytest $(PARALLEL)

test-avx2: $(VENV)/ready-test ## the same tests, as if on a processor with AVX2 alone
	@$(AVX2) $(BIN)/bardlet doctor | grep -E 'precision.*fp32: .*native bf16'
	$(AVX2) $(BIN)/python -m pytest $(PARALLEL)

accept: $(VENV)/ready-test $(VENV)/ready-docs  ## slow tests, on real text, and the course as a site
	$(BIN)/python -m pytest --override-ini addopts= -q -x tests/acceptance

lint: $(VENV)/ready-test     ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# Material for MkDocs announces its end of life in 2027 at every build; this is its own switch for it.
docs: $(VENV)/ready-docs     ## the course as a site: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

install: $(VENV)/ready-test  ## everything that the tests need
	@echo 'bardlet is installed in $(VENV); run: source $(BIN)/activate'

# The newest file of the three marks says what is installed: the environment, torch, bardlet, the test tools.
$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit("bardlet needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": name another with make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: install it (Debian, Ubuntu: apt install python3-venv), then call make again"; exit 1; }
	@echo 'installing into $(VENV): a few minutes the first time, mostly PyTorch'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Without an NVIDIA GPU the CPU build of torch, a tenth of the size, where the package client knows of one.
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

clean:                       ## remove the environment and the caches; runs stay
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
