# Two commands: `make demo` (install, run every paper notebook in profile smoke, end with a page) and `make test`.
# `make report PROFILE=mini` runs the same notebooks at a scale that says something; PROFILE=paper DATA_ROOT=... on a CUDA machine asks before it starts (YES=1: it does not).

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= smoke
# of `make report`; each may be left out
DATA_ROOT ?=
WEIGHTS_ROOT ?=
OUT ?=
BIN     := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo report test sync install clean
.DEFAULT_GOAL := demo

demo: install
	caf-report --profile smoke

report: install
	caf-report --profile $(PROFILE) $(if $(OUT),--out "$(OUT)") $(if $(DATA_ROOT),--data-root "$(DATA_ROOT)") $(if $(WEIGHTS_ROOT),--weights-root "$(WEIGHTS_ROOT)") $(if $(YES),--yes) $(if $(FRESH),--fresh)

# One thread a process, and a process a core: small tensors gain nothing from more threads and lose much by waiting for them.
test: export OMP_NUM_THREADS := 1
test: install sync
	nbdev_test --n_workers 2 --do_print --skip_file_re '^(table|figure|discrepancies|benchmark|claims)'
	pytest -n 2 --dist loadfile

# The notebooks are the source: exporting and cleaning them once more must change nothing.
sync: install
	@before=$$(git status --porcelain; git diff | git hash-object --stdin); \
	nbdev_export && nbdev_clean && python tools/stale.py && \
	after=$$(git status --porcelain; git diff | git hash-object --stdin); \
	if [ "$$before" != "$$after" ]; then \
	  git status --short; echo "The notebooks and caf_nb/ are out of step: run nbdev_export and nbdev_clean, then commit."; exit 1; fi
	@echo "notebooks and caf_nb/ are in sync and clean"

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing PyTorch and friends into .venv: about 7 GB, a few minutes."
	$(BIN)/python -m pip install --progress-bar on -e '.[all]'
	touch $@

clean:
	rm -rf .venv out/smoke out/cache
