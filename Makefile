# Two commands on a fresh machine: `make demo` shows a model learn a preference, `make test` runs the tests.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test torture families lint clean

demo: $(VENV)/run
	$(BIN)/python demo/run.py

test: $(VENV)/dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Some minutes of kills, faults and full disks; what came of it is in benchmarks/results/torture.md.
torture: $(VENV)/dev
	$(BIN)/python tests/support/torture.py --report benchmarks/results/torture.md

# All model families through SFT, DPO, reward and export, a few steps each: some minutes. The table stands in docs/models.md.
families: $(VENV)/dev
	$(BIN)/python tests/support/run_families.py --report docs/models.md

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installed once, and again when the pinned versions change.
$(VENV)/run: requirements.txt
	@echo "installing into $(VENV): once, some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	$(BIN)/pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV)
