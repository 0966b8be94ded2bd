# Everything runs in .venv, made from requirements.lock. `make` alone lists the targets.

PYTHON ?= python3
# Where torch's small CPU build comes from; `make book TORCH_INDEX=` takes the default build (CUDA on
# Linux). What was said last is kept in .venv, and holds until something else is said.
TORCH := .venv/.torch
ifeq ($(origin TORCH_INDEX),undefined)
TORCH_INDEX := $(shell cat $(TORCH) 2>/dev/null || echo https://download.pytorch.org/whl/cpu)
else
OTHER_TORCH := $(shell [ -f $(TORCH) ] && [ "$$(cat $(TORCH))" = "$(TORCH_INDEX)" ] || echo stale)
endif

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PIPELINE := PYTHONPATH=book $(PY) -m pipeline
READY := .venv/.ready
# Numbers must not depend on how many cores happen to be free.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONHASHSEED=0

# .venv has to be made ready again where Python was upgraded (its packages are gone with the old
# one), in a tree that was moved or copied (it still names the first), and for another torch.
RUNS := $(PY) -c 'import pip' 2>/dev/null
STALE := $(OTHER_TORCH) $(shell $(RUNS) && [ "$$(cat $(READY) 2>/dev/null)" = "$(CURDIR)" ] || echo stale)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help book test html links notebooks full bench speed torture lint clean distclean lock
.PHONY: stale

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name does; \
	do printf '  make %-10s %s\n' "$$name" "$$does"; done

book: $(READY) ## Run the notebooks (quick profile) and render the book to _build/html
	@$(PIPELINE) execute --profile quick
	@$(PIPELINE) html --profile quick

test: $(READY) lint ## Check everything: style, stored outputs, package, rendered book
	$(ONE_THREAD) $(PY) -m pytest --nbval --nbval-cell-timeout 600 -W default -n 2 --dist loadscope -q notebooks
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist loadfile --cov --cov-report=term tests

html: $(READY) ## Render the committed outputs, running nothing
	@$(PIPELINE) html

links: $(READY) ## Ask the book's external links whether they still answer
	@$(PIPELINE) links

notebooks: $(READY) ## Run the notebooks (quick profile) and refresh the committed outputs
	@$(PIPELINE) refresh

full: $(READY) ## Run the notebooks at full size on the best device, refresh book/results, render
	@$(PIPELINE) execute --profile full
	@$(PIPELINE) html --profile full

bench: $(READY) ## Run what is missing of a study (EXPERIMENT=table1, table4, ..., figure4, cells, waterfall)
	@$(ONE_THREAD) $(PY) -m smslib.benchmark $(EXPERIMENT)

speed: $(READY) ## Measure speed on this machine: fits, and cuts of large files (benchmarks.json, prepare.json)
	@$(PY) tests/benchmarks/bench_core.py --out book/results
	@$(PY) tests/benchmarks/prepare_speed.py --out book/results

torture: $(READY) ## Try to break everything: kills, hostile files, extreme numbers, planted faults (reliability.json)
	@$(ONE_THREAD) $(PY) tests/torture/run.py --out book/results

lint: $(READY) ## Check the style of the code, and spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib

clean: ## Remove everything built, keep .venv
	rm -rf _build build .pytest_cache .ruff_cache .hypothesis .coverage *.egg-info

distclean: clean ## Remove .venv too
	rm -rf .venv

# papermill asks for the first on Python 3.12 alone, ipykernel for the second on macOS alone.
ELSEWHERE := aiohttp appnope

lock: ## Rewrite requirements.lock from a fresh environment with the newest versions allowed
	rm -rf _build/lock
	$(PYTHON) -m venv _build/lock
	$(call install_torch,_build/lock/bin/python -m pip,)
	_build/lock/bin/python -m pip install --quiet -e '.[book,test]' $(ELSEWHERE)
	( sed '/^[^#]/d' requirements.lock; \
	  _build/lock/bin/python -m pip list --format=freeze --exclude pip --exclude smslib | sed 's/+[a-z0-9.]*$$//' ) > _build/requirements.lock
	mv _build/requirements.lock requirements.lock

# Only torch itself comes from TORCH_INDEX, its dependencies from the usual place. Where that index
# does not answer, pip's other sources and then the full installation below find torch.
define install_torch
	@if [ -n "$(TORCH_INDEX)" ]; then \
	  $(1) install --quiet --no-deps --retries 0 --timeout 10 --index-url "$(TORCH_INDEX)" $(2) torch \
	  || echo "No CPU build of torch at $(TORCH_INDEX): taking the default one."; fi
endef

$(READY): pyproject.toml requirements.lock $(STALE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "smslib needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -1). Say which: make PYTHON=python3.12" >&2; exit 1; }
	@rm -f $@
	@$(RUNS) || $(PYTHON) -m venv --clear .venv
	$(if $(OTHER_TORCH),@rm -f $(TORCH); $(PIP) uninstall -qq --yes torch)
	$(call install_torch,$(PIP),-c requirements.lock)
	$(PIP) install --quiet -c requirements.lock -e '.[book,test]'
	@echo "$(TORCH_INDEX)" > $(TORCH)
	@echo "$(CURDIR)" > $@
