# Two commands matter: `make lab` to learn, `make test` to check. Both set up .venv first, if it is not there yet.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One notebook or test file per process; more than 8 run out of memory before they run out of work.
WORKERS ?= $(shell $(PYTHON) -c "import os; n = getattr(os, 'sched_getaffinity', None); print(min(8, len(n(0)) if n else os.cpu_count() or 2))")
# What stored outputs are made with (scripts/notebooks.py says why); set here too so that it holds before Python starts.
FIXED := env -u PEFTLAB_BASE OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONHASHSEED=0
NBVAL ?= --nbval
ARGS ?=
NB ?=
# lora_rank.py, classic.py, field.py, qlora.py, forgetting.py and remedies.py are experiments of half an hour and more with
# recorded results: run by hand, as are adapters.py and merging.py; agreement.py needs llama.cpp;
# quantize_memory.py and vram_published.py take minutes, nf4_gpu.py and vram_gpu.py a GPU; serve.py, latency.py and
# many_adapters.py write their records in data/results anew
BENCHMARKS := benchmarks/step.py benchmarks/count.py benchmarks/nf4.py

.DEFAULT_GOAL := help
.PHONY: help setup lab test test-fast test-notebooks test-browser test-export test-grid lint bench notebooks count pins clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## .venv with the pinned packages and peftlab (once, about two minutes)

$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 14) or sys.exit("Python %d.%d found, 3.10 to 3.13 needed; name one: make PYTHON=python3.12 …" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "no virtual environment: install Python's venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m ipykernel install --prefix $(VENV) --name peftlab --display-name peftlab --env OMP_NUM_THREADS 1
	@$(BIN)/python -c "import matplotlib.font_manager"  # builds matplotlib's font cache now, not in a lesson
	@touch $@

lab: setup  ## the course in JupyterLab, at its first notebook (ARGS: more options for jupyter lab)
	@$(BIN)/python scripts/lab.py $(ARGS)

test: setup  ## everything: unit tests and all notebooks, in parallel
	$(FIXED) $(BIN)/python -m pytest notebooks tests $(NBVAL) --nbval-current-env -n $(WORKERS) --dist loadfile $(ARGS)

test-fast: setup  ## the unit tests alone
	$(FIXED) $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile $(ARGS)

test-notebooks: setup  ## the notebooks alone (NBVAL=--nbval-lax: run them, compare nothing)
	$(FIXED) $(BIN)/python -m pytest notebooks $(NBVAL) --nbval-current-env -n $(WORKERS) --dist loadfile $(ARGS)

test-browser: setup  ## JupyterLab in a real Chromium: a lesson runs and its widgets move
	$(FIXED) $(BIN)/python -m pytest tests/browser -m browser $(ARGS)

test-export: setup  ## exported files in the real llama.cpp, if it is installed: pip install -e ".[llama]"
	$(FIXED) $(BIN)/python -m pytest tests/export -m export -s $(ARGS)

test-grid: setup  ## the rest of the grids of which `make test` runs a part: a quarter of an hour
	$(FIXED) $(BIN)/python -m pytest tests -m grid -n $(WORKERS) --dist loadfile $(ARGS)

lint: setup  ## ruff (notebooks too), mypy on peftlab/, codespell
	@failed=; for tool in "ruff check ." mypy codespell; do \
		echo "$(BIN)/$$tool"; $(BIN)/$$tool || failed="$$failed $${tool%% *}"; done; \
		[ -z "$$failed" ] || { echo "make lint:$$failed" >&2; exit 1; }

bench: setup  ## the benchmarks: ours beside the reference, on this machine
	@for file in $(BENCHMARKS); do echo "== $$file"; $(FIXED) $(BIN)/python $$file $(ARGS) || exit 1; done

notebooks: setup  ## run the notebooks again and store their outputs (NB: which ones)
	$(FIXED) $(BIN)/python scripts/notebooks.py run $(NB)

count: setup  ## how many outputs of each notebook are compared
	@$(BIN)/python scripts/notebooks.py count

pins:  ## requirements.txt anew from pyproject.toml (ARGS=--upgrade: newest versions)
	$(PYTHON) scripts/pins.py $(ARGS)

clean:  ## remove what tools leave behind (rm -rf .venv for the rest)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info .coverage htmlcov
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -not -path './$(VENV)/*' -prune -exec rm -rf {} +
