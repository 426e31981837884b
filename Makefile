# make demo       install into .venv, then fine-tune six exits on BBC News (no network needed after the install)
# make test       install, then the test suite
# make test-slow  the tests marked slow
# make quality    lint and format check
#
# PYTHON=path/to/python uses an environment that exists and installs nothing.

.PHONY: help demo test test-slow quality clean
.DEFAULT_GOAL := help

ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
endif

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

.venv/.installed: setup.py pyproject.toml
	@echo "Installing into .venv: this downloads about 6 GB, once (torch and torchvision are most of it)."
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	@rm -rf runs/demo
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(PYTHON) run_glue_een.py recipes/bbc_news_minilm_joint.yaml --output_dir runs/demo

test: $(INSTALLED)
	$(PYTHON) -m pytest

test-slow: $(INSTALLED)
	$(PYTHON) -m pytest -m slow

quality: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
