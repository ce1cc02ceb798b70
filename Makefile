# make quickstart: a small Table 1 from real images in minutes.   make test: lint and all tests.
# make benchmark: the speed tables against PyTorch, on this machine's CPU.
PYTHON ?= python3
VENV := .venv
QUICKSTART_WORKDIR ?= runs/quickstart

# The tests compile without most of XLA's optimiser, which is faster but would hide its mistakes. So
# the core's known answers run once more, compiled as users compile them.
FULLY_COMPILED := $(addprefix tests/test_,losses.py norm.py step.py wiring.py) \
    tests/test_reference_logits.py::test_logits_are_pytorchs

.PHONY: quickstart test lint benchmark clean

quickstart: $(VENV)/run
	$(VENV)/bin/python main.py --mode=study --config=configs/quickstart.py \
	    --workdir=$(QUICKSTART_WORKDIR)

test: $(VENV)/dev lint
	$(VENV)/bin/python -m pytest
	ENSADV_TESTS_COMPILE=fully $(VENV)/bin/python -m pytest $(FULLY_COMPILED)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/shellcheck launch/*.sh

benchmark: $(VENV)/benchmark
	$(VENV)/bin/python benchmarks/speed.py

# A missing venv is made, and filled again when the requirements are newer.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@ $(VENV)/run

# torchattacks asks for an old requests, which it does not use: see requirements-benchmark.txt.
$(VENV)/benchmark: requirements-benchmark.txt requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-benchmark.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps torchattacks==3.5.1
	touch $@ $(VENV)/run

clean:
	rm -rf $(VENV) runs
