# Each target works alone on a fresh clone: it makes the environment that it needs.
# Needs only Python >= 3.11 (PYTHON=python3.12 make test chooses another).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/lm_sotu.py
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))
ARGS ?=

.PHONY: train test soak lint clean

train: $(VENV)/.train
	$(BIN)/python -m train --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

# EMOE_TEST_OPTIMIZED=1 make test compiles programs as training does: twice the time.
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

# Full products where the tests take pairwise covers: hours. ARGS="-k expert8" takes a part.
soak: $(VENV)/.soak
	EMOE_TEST_DEVICES=16 $(BIN)/python -m pytest -q -n 2 -m soak $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch docs/studies/*.sh .ci/run

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(f"emoe_jax needs Python 3.11 or later, {sys.executable} is {sys.version.split()[0]}; run make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# The extras of pyproject.toml; installed again when it changes.
$(VENV)/.train $(VENV)/.test $(VENV)/.soak $(VENV)/.lint: $(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[cpu,$*]'
	touch $@
