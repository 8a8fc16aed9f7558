# Two commands matter: `make serve` and `make test`. The rest is listed by `make help`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PY := .venv/bin
# PyPI's torch for Linux brings several GB of CUDA packages. On a machine without an NVIDIA GPU you
# may set TORCH to a CPU build, with pip's options, e.g. TORCH="torch --index-url <PyTorch's CPU index>".
TORCH ?= torch==2.13.0

.PHONY: help serve setup setup-dev test check format lint types layers shell bench clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

serve: .venv/.serve ## set up what is missing, then serve the demo model disaggregated (Ctrl-C ends it)
	@exec launch/disagg.sh

setup: .venv/.serve ## create .venv with everything that serving needs
setup-dev: .venv/.dev ## add what the tests and checks need

.venv/bin/python:
	@container/setup_venv.sh .venv

.venv/.serve: pyproject.toml | .venv/bin/python
	@echo "setup: installing torch and trtllm-launch into .venv (once)"
	@$(PY)/python -m pip install -q $(TORCH)
	@$(PY)/python -m pip install -q -e '.[torch,ucx,mpi,nats,etcd,vision]'
	@touch $@

.venv/.dev: .venv/.serve
	@echo "setup: installing what the tests need into .venv (once)"
	@$(PY)/python -m pip install -q -e '.[nixl]' --group dev
	@touch $@

test: .venv/.dev ## set up what is missing, then run all tests that need no GPU
	@$(PY)/pytest -m "not gpu and not trtllm and not multi_gpu"

check: lint types layers shell test ## everything CI runs, in CI's order
lint: .venv/.dev ; $(PY)/ruff format --check . && $(PY)/ruff check .
types: .venv/.dev ; $(PY)/mypy
layers: .venv/.dev ; $(PY)/lint-imports
shell: .venv/.dev
	$(PY)/shellcheck -x launch/*.sh multinode/*.sh multinode/*.sbatch benchmarks/*.sh container/*.sh tests/slurm/*.sh .ci/run
	$(PY)/shfmt -i 2 -ci -d launch multinode benchmarks container tests/slurm .ci/run
	$(PY)/hadolint container/Dockerfile tests/fakes/release_image/Dockerfile
format: .venv/.dev ## rewrite files in place
	$(PY)/ruff format . && $(PY)/ruff check --fix .
	$(PY)/shfmt -i 2 -ci -w launch multinode benchmarks container tests/slurm .ci/run

clean: ## remove .venv and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
