PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install demo test test-all check bench audit results render clean

help:
	@echo 'make demo     compare training with and without fastreg'
	@echo 'make test     run the tests, in the Triton interpreter and ahead of time (no GPU needed)'
	@echo 'make test-all run the tests that take long, which make test leaves out'
	@echo 'make check    lint, formatting, types, names and sentences'
	@echo 'make bench    time fastreg against torch and other libraries, in about twenty minutes'
	@echo 'make audit    read the machine code of every kernel for all targets'
	@echo 'make results  measure and audit anew what the READMEs tell; make render only writes them'
	@echo 'make clean    remove .venv, caches and build products'
	@echo
	@echo 'Each target first creates .venv and installs what it needs. PYTHON=... picks the interpreter.'

install: $(INSTALLED)

# Touched last, so an interrupted install is started again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "fastreg needs Python >= 3.10, but $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/fastreg compare

# Triton decides when it is imported whether it interprets or compiles, which takes a process each.
test: MARKED = not slow
test-all: MARKED = slow
test test-all: $(INSTALLED)
	@$(BIN)/pytest -n 2 -m '$(MARKED)' tests --ignore=tests/benchmarks; tests=$$?; \
	env -u TRITON_INTERPRET $(BIN)/pytest -n 2 -m '$(MARKED)' tests/benchmarks; audit=$$?; \
	echo "exit status: tests $$tests, code audit $$audit"; \
	test $$tests -eq 0 -a $$audit -eq 0

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/lint.py

bench: $(INSTALLED)
	$(BIN)/fastreg bench

audit: $(INSTALLED)
	env -u TRITON_INTERPRET $(BIN)/python -m fastreg_benchmarks.audit

results: $(INSTALLED)
	$(BIN)/fastreg bench --device cpu --out benchmarks/results/cpu
	env -u TRITON_INTERPRET $(BIN)/python -m fastreg_benchmarks.audit --json benchmarks/results/audit.json
	$(BIN)/python -m fastreg_benchmarks.precision --json benchmarks/results/precision.json
	$(BIN)/python -m fastreg_benchmarks.activation --json benchmarks/results/activation.json
	env -u TRITON_INTERPRET $(BIN)/python -m fastreg_benchmarks.cold_start --json benchmarks/results/cold_start.json
	$(MAKE) render

render: $(INSTALLED)
	$(BIN)/python -m fastreg_benchmarks.render

clean:
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
