# The doors of the house: `make quickstart` and `make test` need python3 (3.11+), venv and make.
PYTHON ?= python3
BIN := .venv/bin
QUICK := quickstart
STUDY ?= configs/study.yaml
LOGS ?= $(shell sed -n 's/^log_dir: *//p' $(STUDY))

.PHONY: setup setup-test quickstart test lint data study clean faults

setup: .venv/installed
setup-test: .venv/installed-test

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/pip install --disable-pip-version-check -q -r requirements-test.txt
	touch $@

# A generated corpus, both sweeps in miniature on the CPU, a CSV and plots, in $(QUICK)/. The sweeps
# run side by side with one thread each: on two cores twice as fast as one after the other.
QUICK_SWEEP := $(BIN)/python run_experiment.py --exp all --device cpu --log_dir $(QUICK)/logs --config configs/quickstart
quickstart: setup
	$(BIN)/python scripts/make_corpus.py --output $(QUICK)/corpus
	$(BIN)/python scripts/preprocess_lm.py --input $(QUICK)/corpus --vocab_size 512 --output $(QUICK)/tokens
	$(BIN)/python scripts/check_leakage.py --corpus $(QUICK)/corpus --smallbench $(QUICK)/corpus/smallbench
	$(QUICK_SWEEP)_embed.yaml & embed=$$!; $(QUICK_SWEEP)_glu.yaml & glu=$$!; wait $$embed; code=$$?; wait $$glu && exit $$code
	$(BIN)/python scripts/aggregate_results.py --log_dir $(QUICK)/logs --output $(QUICK)/results_summary.csv
	$(BIN)/python -m src.analysis.quickstart $(QUICK)

test: setup-test
	$(BIN)/python -m pytest

lint: setup-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The PRD's three data commands (hub, or a mirror named by HUB_MIRROR), then the leakage check.
data: setup
	$(BIN)/python scripts/download_wikitext.py --output data/wikitext-2
	$(BIN)/python scripts/preprocess_lm.py --input data/wikitext-2 --vocab_size 16000 --output data/lm_tokenized
	$(BIN)/python scripts/download_smallbench.py --output data/smallbench
	$(BIN)/python scripts/check_leakage.py --corpus data/wikitext-2 --smallbench data/smallbench

# Phases 0, 1, 1b and 2, the CSV, the figures and the report's tables; prints its plan and cost
# first, stops before its budget, and goes on where it was cut (docs/RUNBOOK.md).
study: setup
	$(BIN)/python run_experiment.py --study $(STUDY) --log_dir $(LOGS)
	$(BIN)/python scripts/aggregate_results.py --log_dir $(LOGS) --output results_summary.csv $(if $(wildcard REPORT.md),--report REPORT.md)

# The whole fault plan (docs/RELIABILITY.md); `make test` runs a sample of it.
faults: setup-test
	$(BIN)/python -m tests.faults

clean:
	rm -rf .venv quickstart .pytest_cache .hypothesis .mypy_cache .ruff_cache
