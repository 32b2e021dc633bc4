# make demo, make demo-detection, make demo-segmentation: train, test and look at a small net; OPTIONS go to `fit`.
# make test: the test-suite without the tests that take minutes, which are make test-slow.   All of them set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-detection demo-segmentation test test-slow lint clean

demo: $(VENV)/.demo-installed
	$(BIN)/visionattn demo $(OPTIONS)

demo-detection demo-segmentation: $(VENV)/.demo-installed
	$(BIN)/visionattn $(subst -, ,$@) $(OPTIONS)

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[export]"
	touch $@

$(VENV)/.dev-installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
