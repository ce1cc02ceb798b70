# make quickstart: a small Table 1 from real images in minutes.   make test: lint and all tests.
PYTHON ?= python3
VENV := .venv
QUICKSTART_WORKDIR ?= runs/quickstart

.PHONY: quickstart test lint clean

quickstart: $(VENV)/run
	$(VENV)/bin/python main.py --mode=study --config=configs/quickstart.py \
	    --workdir=$(QUICKSTART_WORKDIR)

test: $(VENV)/dev lint
	$(VENV)/bin/python -m pytest

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The venv is made again where it is missing, and filled again where the requirements are newer.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@ $(VENV)/run

clean:
	rm -rf $(VENV) runs
