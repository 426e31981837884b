# make demo       install into .venv, then fine-tune six exits on BBC News (no network needed after the install)
# make test       install, then the test suite
# make test-slow  the tests marked slow
# make test-lowest  the test suite with the lowest versions that pyproject.toml allows, in .venv-lowest (LOWEST_PYTHON=python3.10)
# make quality    lint and format check
# make docs       write docs/api.md from the docstrings
# make benchmark-gpu    benchmarks/gpu.py, under four minutes on one GPU, into runs/gpu
# make benchmark-page   write benchmarks/README.md from the results in benchmarks/results
# make benchmark-smoke  the whole chain of benchmarks at tiny size, in a few minutes, into runs/benchmark-smoke
#
# PYTHON=path/to/python uses an environment that exists and installs nothing.

.PHONY: help demo test test-slow test-lowest quality docs benchmark-gpu benchmark-page benchmark-smoke clean
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
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(PYTHON) run_glue_een.py recipes/best_text.yaml --output_dir runs/demo

# Two processes, each file in one of them, in the order of tests/conftest.py.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
test: $(INSTALLED)
	$(PYTHON) -m pytest $(TWO)

test-slow: $(INSTALLED)
	$(PYTHON) -m pytest -m slow $(TWO)

LOWEST := .venv-lowest
LOWEST_PYTHON ?= python3
$(LOWEST)/.installed: pyproject.toml
	$(LOWEST_PYTHON) -m venv $(LOWEST)
	sed 1,/^dependencies/d pyproject.toml | grep -oE '"[a-z0-9_-]+(\[[a-z,]+\])?>=[0-9.]+"' | sed -E 's/"|\[.*\]//g; s/>=/==/' | sort -u > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/lowest.txt \
		--editable ".[dev]"
	@touch $@

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(TWO)

quality: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

docs: $(INSTALLED)
	$(PYTHON) docs/make_api.py

benchmark-gpu: $(INSTALLED)
	$(PYTHON) benchmarks/gpu.py --results runs/gpu

benchmark-page: $(INSTALLED)
	$(PYTHON) benchmarks/page.py

SMOKE := runs/benchmark-smoke
benchmark-smoke: $(INSTALLED)
	@rm -rf $(SMOKE)
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(PYTHON) benchmarks/quality.py recipes/bbc_news_minilm_joint.yaml --seeds 1 \
		--methods joint two_stage stock cut-2 student-2 --results $(SMOKE)/results --runs $(SMOKE)/quality \
		--max_train_samples 200 --max_eval_samples 100
	$(PYTHON) benchmarks/training_step.py --rounds 1 --batch_size 4 --length 16 --results $(SMOKE)/results
	$(PYTHON) benchmarks/inference.py --repeats 3 --lengths 16 --batch_sizes 8 --rows 32 --results $(SMOKE)/results
	$(PYTHON) benchmarks/gpu.py --small --models minilm vit-small --results $(SMOKE)/results
	$(PYTHON) benchmarks/page.py --folder $(SMOKE)
	@echo "Page: $(SMOKE)/README.md"

clean:
	rm -rf .venv .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache
