# make demo: from nothing to new images in minutes.  make test: the whole suite.  VENV=DIR reuses an environment.
VENV ?= .venv
PYTHON ?= python3
OUT ?= runs/demo

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(VENV)/bin/python walkthroughs/demo.py --out $(OUT)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal --durations=5 tests

$(VENV)/.installed: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf runs .pytest_cache __pycache__ */__pycache__ samples.png prompts.png
