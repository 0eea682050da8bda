# Everything a person runs. Needs Python >= 3.10 with venv, git and make; all else goes into .venv.
PYTHON  ?= python3
WORKERS ?= 2
BIN     := .venv/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo results test test-all ci wheel-test cases bench gpu coverage prepare readme docs clean

# Notebooks run side by side, so one thread each; and what they print must be the same everywhere, without a dependency's own warnings
test test-all ci coverage prepare: export OMP_NUM_THREADS ?= 1
test test-all ci coverage prepare: export PYTHONWARNINGS ?= ignore::FutureWarning:torch.jit._script

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile
	@echo 'PYTHON=python3.12 make … picks the Python that .venv is made with; WORKERS=4 how many notebooks run at once'

# Where Python may not keep compiled modules, each of hundreds of processes compiles PyTorch and timm again: 16 s each
unexport PYTHONDONTWRITEBYTECODE

# Threads with nothing to do sleep instead of spin: timings then depend far less on what else the machine does
bench: export OMP_WAIT_POLICY ?= PASSIVE

install: ## Install kdmed and what it needs into .venv; does nothing when that is done
	@command -v "$(PYTHON)" >/dev/null || { echo 'kdmed needs Python 3.10 or newer, and found no $(PYTHON). Name one: PYTHON=python3.12 make test' >&2; exit 1; }
	@"$(PYTHON)" tools/install.py

demo: install ## Distil a small student from a teacher, and compare them in runs/demo
	$(BIN)/kdmed demo --out runs/demo --force

results: install ## Make everything in results/ again (days of one core; long ones resume): DATA=folder of data sets, NAMES=demo makes one
	$(BIN)/python tools/results.py make $(NAMES) $(if $(DATA),--data $(DATA))

test: install ## Check notebooks, modules, README, lessons, pages and project, within 8 minutes
	@$(BIN)/python tools/stages.py test --workers $(WORKERS)

test-all: install ## Check everything: all lessons and tests, planted bugs, the wheel; write tools/lesson_times.json
	@$(BIN)/python tools/stages.py all --workers $(WORKERS)

ci: install
	@$(BIN)/python tools/stages.py ci --workers $(WORKERS)

wheel-test: install ## Build the wheel, install it alone in fresh environments and use it; EXTRAS=all tries each extra, too; VERSIONS=newest leaves the lowest out
	$(BIN)/python tools/try_wheel.py $(EXTRAS) $(if $(VERSIONS),--versions $(VERSIONS))

cases: install ## Print the table of cases that are tested, kind by kind
	@$(BIN)/python tools/cases.py

bench: install ## Measure, and write bench.json
	$(BIN)/python tests/bench.py

gpu: install ## Run within ten minutes what waits for a GPU, and write gpu_report.md; without one, say what it would run
	$(BIN)/python tools/gpu_check.py

coverage: install ## Run the lessons against the installed package, and report the lines they miss
	$(BIN)/python -m coverage run -m pytest --lessons
	$(BIN)/python -m coverage report --show-missing

prepare: install ## Before a commit: export modules, run all lessons and keep their outputs, clean, render README.md
	$(BIN)/nbdev-export
	$(BIN)/nbdev-test --n-workers $(WORKERS) --save
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

readme: install ## Render README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: install ## Build the site in _docs (needs quarto); RELEASE=1 for the site of a release
	@command -v quarto >/dev/null || { echo 'Building the site needs quarto: https://quarto.org' >&2; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)/tools" $(BIN)/nbdev-docs --n-workers $(WORKERS)
	$(BIN)/python tools/finish_site.py finish _docs $(if $(RELEASE),--release)

clean: ## Remove what the other targets made, except .venv and runs
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .coverage htmlcov nbs/sidebar.yml bench.json gpu_report.md
	find kdmed nbs tests tools -name __pycache__ -prune -exec rm -rf {} +
