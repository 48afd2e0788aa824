# make demo: from nothing to new images in minutes.  make test: the whole suite.  make walkthroughs: the twelve lessons.
# make notebooks: the lessons as notebooks, with their outputs.  VENV=DIR reuses an environment.
VENV ?= .venv
PYTHON ?= python3
OUT ?= runs/demo
LESSONS ?= $(patsubst walkthroughs/%.py,%,$(sort $(wildcard walkthroughs/[01]*.py)))

.PHONY: demo test walkthroughs notebooks clean

demo: $(VENV)/.installed
	$(VENV)/bin/python walkthroughs/demo.py --out $(OUT)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal --durations=5 tests

walkthroughs: $(VENV)/.installed
	set -e; for lesson in $(LESSONS); do $(VENV)/bin/python walkthroughs/$$lesson.py; done

# Figures go to walkthroughs/figures/, which the course page shows. Paths of this machine are cut from what was printed.
notebooks: $(VENV)/.installed-dev
	mkdir -p walkthroughs/notebooks
	set -e; for lesson in $(LESSONS); do \
		notebook=walkthroughs/notebooks/$$lesson.ipynb; \
		$(VENV)/bin/jupytext --quiet --to ipynb --output $$notebook walkthroughs/$$lesson.py; \
		$(VENV)/bin/jupyter execute --inplace --NotebookClient.record_timing=False $$notebook; \
		sed -i.tmp "s#$(CURDIR)/##g" $$notebook; rm $$notebook.tmp; \
		mkdir -p walkthroughs/figures/$$lesson; \
		cp runs/lessons/$$lesson/*.png walkthroughs/figures/$$lesson/; \
	done

$(VENV)/.installed: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf runs .pytest_cache __pycache__ */__pycache__ samples.png samples.gif prompts.png
