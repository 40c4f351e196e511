# `make demo` pretrains a small model on real clips; `make test` runs what CI runs. Both set up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What comes with fastjepa; CI adds DALI and DeepSpeed, whose tests are skipped without them.
EXTRAS ?= train,demo,dev
INSTALLED := $(VENV)/.installed-$(EXTRAS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test suite lint types clean

demo: $(INSTALLED)
	$(BIN)/fastjepa train configs/demo.yaml

test: lint types suite

# Two files of tests at a time, by name: the long ones, of many ranks, then are not the last. The
# second process that crashes ends the run.
suite: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 1

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

# Set up once; again only when the requirements change, so a second run needs no network.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
