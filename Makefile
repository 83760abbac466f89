# Suiron needs Python 3.11+ and make, nothing else. PIP_* variables are honoured, as is PYTHON=python3.12.
#
#   make run            install into .venv and start on 127.0.0.1:8000, with the demo model
#   make run EXTRAS=    the same without torch, into .venv-light: `echo` answers
#   make run ARGS="--port 9000 --config config/gateway.yaml"
#   make test           the tests (under 3 minutes)
#   make test-all       and the slow ones: real engines, races (under 40 minutes)
#   make test-vllm      drives a real vLLM, installed into .venv-vllm (once, 3.4 GB); with
#                       SUIRON_VLLM_PYTHON=/path/to/its/python, the one that is there
#   make check          ruff and mypy
#   make bench          figures against a mock upstream

PYTHON ?= python3
EXTRAS ?= local
ARGS   ?=
WORKERS ?= 2

VENV   := .venv$(if $(EXTRAS),,-light)
BIN    := $(VENV)/bin
comma  := ,
RUN    := client$(if $(EXTRAS),$(comma)$(EXTRAS))
PYTEST := .venv/bin/python -m pytest
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e

run: $(VENV)/installed-run
	@exec $(BIN)/suiron serve $(ARGS)

test: .venv/installed-dev
	$(PYTEST) -n $(WORKERS) --dist loadscope -m "not slow and not vllm"

test-slow: .venv/installed-dev
	$(PYTEST) -m "slow and not vllm"

test-vllm: .venv/installed-dev $(if $(SUIRON_VLLM_PYTHON),,.venv-vllm/installed)
	SUIRON_VLLM_PYTHON=$(or $(SUIRON_VLLM_PYTHON),.venv-vllm/bin/python) $(PYTEST) -m vllm

test-all: test test-slow test-vllm

check: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/installed-dev
	.venv/bin/python -m tests.bench.run $(ARGS)

$(VENV)/installed-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Suiron into $(VENV) (once)."
	@$(if $(EXTRAS),echo "Downloads: about 60 MB$(comma) and torch: 190 MB as its CPU build$(comma) several GB where the index offers only the CUDA one.",echo "Downloads: about 17 MB.")
	@$(INSTALL) ".[$(RUN)]"
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing Suiron and its test tools into .venv (once)."
	@.venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[local,client,dev]"
	@touch $@ .venv/installed-run

.venv-vllm/installed: constraints-vllm.txt | .venv-vllm/bin/python
	@echo "Installing vLLM into .venv-vllm (once): about 1 GB to download$(comma) 3.4 GB on disk."
	@.venv-vllm/bin/python -m pip install --disable-pip-version-check -q --no-deps -r constraints-vllm.txt
	@touch $@

.venv/bin/python .venv-light/bin/python .venv-vllm/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Suiron needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)

.PHONY: run test test-slow test-vllm test-all check bench
