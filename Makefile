# Two commands: `make demo` (install, run every paper notebook in profile smoke, end with a page) and `make test`.
# `make report PROFILE=mini` runs the same notebooks at a scale that says something; PROFILE=paper DATA_ROOT=... on a CUDA machine asks before it starts (YES=1: it does not).

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= smoke
# of `make report`; each may be left out
DATA_ROOT ?=
WEIGHTS_ROOT ?=
FUSED_ROOT ?=
OUT ?=
BIN     := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo report docs test test-slurm test-all types cells sync notebooks install clean
.DEFAULT_GOAL := demo

demo: install
	caf-report --profile smoke

report: install
	caf-report --profile $(PROFILE) $(if $(OUT),--out "$(OUT)") $(if $(DATA_ROOT),--data-root "$(DATA_ROOT)") $(if $(WEIGHTS_ROOT),--weights-root "$(WEIGHTS_ROOT)") $(if $(FUSED_ROOT),--fused-root "$(FUSED_ROOT)") $(if $(YES),--yes) $(if $(FRESH),--fresh)

# The site, from the notebooks as they are committed: no notebook is run, and nothing is fetched.
docs: install
	sphinx-build -q -W --keep-going -c docs . out/docs/html
	@echo "Open in a browser: file://$(CURDIR)/out/docs/html/docs/index.html"

# `make test-all` adds the tests that repeat at length what a shorter one checks as well (CI, every week). One thread per process and one process per core: small tensors gain nothing from more threads.
test test-all: export OMP_NUM_THREADS := 1
test: picked := -m "not long"
test: skipped := |own_data|own_task
test test-all: install sync
	$(MAKE) --no-print-directory -j 2 types cells SKIPPED='$(skipped)'
	pytest -n 2 --dist loadfile $(picked)
	@echo "Not run: make test-slurm. It installs Debian's slurm-wlm and munge as root, starts them, and takes four minutes more."

# Table 1 on a Slurm of this machine, with a cancelled job and a daemon that dies; says why where Slurm cannot be installed.
test-slurm: install
	python tools/slurm.py

types: install
	mypy caf_nb

# The tests in the notebooks.
cells: install
	nbdev_test --n_workers 2 --do_print --skip_file_re '^(overview|table|figure|discrepancies|benchmark|claims|real$(SKIPPED))'

# Cleaning and exporting the notebooks must leave caf_nb/ as it is, and a clean checkout clean. A notebook that was only run is cleaned, and that is all.
sync: install
	@changes=$$(git status --porcelain); \
	modules() { find caf_nb -name '*.py' | LC_ALL=C sort | xargs cat | git hash-object --stdin; }; before=$$(modules); \
	nbdev_clean && nbdev_export && python tools/stale.py || exit 1; \
	if [ "$$before" != "$$(modules)" ] || { [ -z "$$changes" ] && [ -n "$$(git status --porcelain)" ]; }; then \
	  git status --short; echo "The notebooks and caf_nb/ were out of step; nbdev_clean and nbdev_export have been run: commit what they changed."; exit 1; fi
	@echo "notebooks and caf_nb/ are in sync and clean"

# The outputs that library notebooks are committed with.
notebooks: install
	python tools/run_notebooks.py

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing PyTorch and friends into .venv: about 7 GB, a few minutes."
	$(BIN)/python -m pip install --no-compile --progress-bar on -e '.[all]'
	touch $@

clean:
	rm -rf .venv out/smoke out/cache out/docs docs/api
