PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
REVIEWS := .cache/vaderSentiment-3.3.2.tar.gz

.PHONY: demo test test-all lint docs unit slow cluster zoo bench scaling study notebook clean

demo: $(VENV)/.ready $(REVIEWS)
	$(RUN)/python integrations/trainer/sentiment.py --reviews $(REVIEWS) --output runs/demo

test: lint docs unit

# With what is slow, many processes, and every stock architecture: about 50 minutes more.
test-all: test slow cluster zoo

lint: $(VENV)/.ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

docs: $(VENV)/.ready
	$(RUN)/mkdocs build --strict

unit: $(VENV)/.ready $(REVIEWS)
	$(RUN)/pytest -n 2 --dist worksteal

slow: $(VENV)/.ready
	$(RUN)/pytest -n 2 --dist worksteal -m "slow and not cluster"

# Launches four processes at a time. Two hosts take root and `ip netns`; without, those tests are skipped.
cluster: $(VENV)/.ready
	$(RUN)/pytest -m cluster

zoo: $(VENV)/.ready
	PYTHONPATH=tests:benchmarks $(RUN)/python tests/zoo/table.py
	$(RUN)/pytest -n 2 -m zoo tests/zoo

# Runs docs/notebook.ipynb and keeps what it shows: about six minutes on 2 cores.
notebook: $(VENV)/.ready $(REVIEWS)
	rm -rf runs/notebook
	$(RUN)/python tests/run_notebook.py

# BENCH="--quick", BENCH="--only gemma_lora" and the like go through to the script.
bench: $(VENV)/.bench $(REVIEWS)
	PYTHONPATH=. $(RUN)/python benchmarks/run.py $(BENCH)

# What a step costs over several workers: some minutes, on an idle machine.
scaling: $(VENV)/.ready
	PYTHONPATH=. $(RUN)/python benchmarks/workers.py --measure

# QUICK=1 runs every method for moments, to see that it runs. STUDY="--tasks movies --budgets 2m --jobs 2" and the like
# go through. What has been run stays: the same command goes on where it was.
study: $(VENV)/.ready $(REVIEWS)
	$(if $(QUICK),rm -rf runs/study-quick)
	PYTHONPATH=.:benchmarks $(RUN)/python -m study $(if $(QUICK),--quick --jobs 2) $(STUDY)

$(VENV)/.bench: $(VENV)/.ready
	$(RUN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt torch
	$(RUN)/pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	touch $@

$(REVIEWS): | $(VENV)/.ready
	$(RUN)/pip download --quiet --no-deps --no-binary :all: --dest $(@D) vaderSentiment==3.3.2

clean:
	rm -rf $(VENV) .cache runs site build dist
