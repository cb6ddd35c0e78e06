# Every target installs what it needs, once, into .venv. `make trace` alone takes a newcomer to a result.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled by whatever imports them first: pip would take a minute to compile what nobody imports.
PIP_INSTALL = pip install --quiet --disable-pip-version-check --no-compile
INSTALL = $(BIN)/$(PIP_INSTALL) -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=

# make trace MODEL=gpt2-xl PROMPT="..." SUBJECT="..."
# make edit MODEL=gpt2-xl PROMPT="..." SUBJECT="..." TARGET="..."
MODEL ?= atlas
PROMPT ?=
SUBJECT ?=
TARGET ?=
ARGS ?=
# make average MODEL=gpt2-xl N=1000 FACTS=data/known_1000.json WORKERS=4
N ?= 1000
FACTS ?=
WORKERS ?= 1
RAY = $(if $(filter-out 1,$(WORKERS)),$(VENV)/installed-ray)
# Taken as they are: make would read a $ in a prompt as a variable of its own.
override MODEL := $(value MODEL)
override PROMPT := $(value PROMPT)
override SUBJECT := $(value SUBJECT)
override TARGET := $(value TARGET)
override OUT := $(value OUT)
override FACTS := $(value FACTS)
export MODEL PROMPT SUBJECT TARGET OUT FACTS

.PHONY: help setup trace average report edit stats evaluate paper test test-all test-hooked-transformer check format bench bench-edits bench-evaluate notebooks figures atlas atlas-release atlas-editors atlas-search atlas-facts clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 28

# Stamps: remade when what they install changes.
$(VENV)/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing factlens into $(VENV) (once)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing the development tools into $(VENV) (once)"
	@$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/installed-notebooks $(VENV)/installed-ray

$(VENV)/installed-ray: $(VENV)/installed
	@echo "installing Ray into $(VENV) (once)"
	@$(INSTALL) -e '.[ray]'
	@touch $@

$(VENV)/installed-notebooks: $(VENV)/installed
	@echo "installing Jupyter into $(VENV) (once)"
	@$(INSTALL) -e '.[notebooks]'
	@touch $@

$(VENV)/installed-registries: $(VENV)/installed
	@echo "installing the registries into $(VENV) (once)"
	@$(INSTALL) -e '.[registries]'
	@touch $@

setup: $(VENV)/installed-dev  ## Everything for development, in .venv

# The shell reads the variables from the environment, so a prompt may hold any character.
trace: $(VENV)/installed  ## Trace a fact; MODEL=, PROMPT=, SUBJECT=, OUT=, ARGS= (more options)
	@if [ -n "$$PROMPT" ]; then \
	  $(BIN)/factlens trace --subject "$$SUBJECT" --model "$$MODEL" --out "$${OUT:-runs/trace}" $(ARGS) -- "$$PROMPT"; \
	else \
	  $(BIN)/factlens trace --model "$$MODEL" --out "$${OUT:-runs/trace}" $(ARGS); \
	fi

average: $(VENV)/installed $(RAY)  ## Trace a thousand facts, resumable; MODEL=, N=, FACTS=, WORKERS=, OUT=, ARGS=
	@$(BIN)/factlens average --model "$$MODEL" --n $(N) --workers $(WORKERS) $(if $(FACTS),--facts "$$FACTS") \
	  --out "$${OUT:-runs/average-$$(basename "$$MODEL")}" $(ARGS)

report: $(VENV)/installed  ## Write the page of a run again; OUT=, ARGS="--images svg"
	@$(BIN)/factlens report "$${OUT:-runs/average-$$(basename "$$MODEL")}" $(ARGS)

edit: $(VENV)/installed  ## Change a fact (ROME); MODEL=, PROMPT=, SUBJECT=, TARGET=, OUT=, ARGS="--layer 17"
	@if [ -n "$$PROMPT" ]; then \
	  $(BIN)/factlens edit --subject "$$SUBJECT" --target "$$TARGET" --model "$$MODEL" --out "$${OUT:-runs/edit}" $(ARGS) -- "$$PROMPT"; \
	else \
	  $(BIN)/factlens edit --model "$$MODEL" --out "$${OUT:-runs/edit}" $(ARGS); \
	fi

stats: $(VENV)/installed  ## Gather what edits need to know of a model, once, resumable; MODEL=, ARGS="--layer 17"
	@$(BIN)/factlens stats --model "$$MODEL" $(ARGS)

evaluate: $(VENV)/installed  ## Score edits on atlas-CounterFact, with controls; MODEL=, ARGS="--n 200"
	@$(BIN)/factlens evaluate --model "$$MODEL" $(ARGS)

paper: $(VENV)/installed $(RAY)  ## Every figure and table of the paper in one report, resumable; MODEL=, FACTS=, QUICK=1, WORKERS=, OUT=, ARGS="--records FILE --zsre FILE"
	@$(BIN)/factlens paper --model "$$MODEL" --workers $(WORKERS) $(if $(FACTS),--facts "$$FACTS") $(if $(QUICK),--quick) \
	  --out "$${OUT:-runs/paper-$$(basename "$$MODEL")$(if $(QUICK),-quick)}" $(ARGS)

test: $(VENV)/installed-dev  ## The tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: $(VENV)/installed-dev  ## The tests, the slow ones too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not notebooks' $(ARGS)

test-hooked-transformer:  ## Engines and edits under TransformerLens 3.9, in an environment of its own
	@$(MAKE) --no-print-directory .venv-3.9/installed
	@OMP_NUM_THREADS=1 .venv-3.9/bin/python -m pytest -n 2 tests/test_hooked_transformer.py tests/test_generation.py tests/test_exports.py tests/test_edits.py $(ARGS)

# Takes from .venv whatever TransformerLens 3.9 does not need in another version.
.venv-3.9/installed: $(VENV)/installed-dev
	@test -x .venv-3.9/bin/python || $(PYTHON) -m venv .venv-3.9
	@echo "installing TransformerLens 3.9 into .venv-3.9 (once)"
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$packages" > "$$(.venv-3.9/bin/python -c "$$packages")/packages-of-venv.pth"
	@grep -v '^transformer-lens==' constraints.txt > .venv-3.9/constraints.txt
	@.venv-3.9/bin/$(PIP_INSTALL) --no-deps -e .
	@.venv-3.9/bin/$(PIP_INSTALL) -c .venv-3.9/constraints.txt 'transformer-lens==3.9.0'
	@touch $@

check: $(VENV)/installed-dev  ## Formatting, linting, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/installed-dev  ## Let ruff format and fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/installed  ## One-pass against plain, in one process; ARGS="--quick" for a short look
	@$(BIN)/python -m factlens.benchmark $(ARGS)

bench-edits: $(VENV)/installed  ## An edit against the official procedure, in one process; ARGS="--quick"
	@$(BIN)/python -m factlens.edit_benchmark $(ARGS)

bench-evaluate: $(VENV)/installed  ## evaluate against a straightforward loop, in one process; ARGS="--quick"
	@$(BIN)/python -m factlens.evaluation_benchmark $(ARGS)

notebooks: $(VENV)/installed-dev  ## Execute every notebook
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m notebooks tests/test_notebooks.py $(ARGS)

figures: $(VENV)/installed  ## The README's figure (needs chromium)
	@$(BIN)/factlens trace --out runs/figures
	@mkdir -p docs/figures
	@chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1480,480 \
	  --virtual-time-budget=4000 --screenshot=docs/figures/trace.png file://$(CURDIR)/runs/figures/trace.html

atlas: $(VENV)/installed  ## Train the bundled model again into runs/atlas (resumes; about an hour)
	@$(BIN)/python -m factlens.atlas --out runs/atlas $(ARGS)

atlas-release: $(VENV)/installed $(RAY)  ## Measure what depends on the bundled model, and write it into configs, README and docs; resumable
	@$(BIN)/python -m factlens.atlas_release measure --workers $(WORKERS) $(ARGS)
	@$(BIN)/python -m factlens.atlas_release write

# make -j2 atlas-editors trains two at a time.
TRAINED := src/factlens/editors/trained
atlas-editors: $(foreach name,mend mend-cf mend-zsre ke ke-cf ke-zsre,$(TRAINED)/$(name).safetensors)  ## Train MEND and KE for the bundled model, into the package; resumable

$(TRAINED)/%.safetensors: src/factlens/atlas/checkpoint/model.safetensors | $(VENV)/installed
	@$(BIN)/factlens train-editor $(firstword $(subst -, ,$*)) --data $(or $(word 2,$(subst -, ,$*)),generic) \
	  --steps $(if $(word 2,$(subst -, ,$*)),800,1200) --out runs/editors/$*
	@mkdir -p $(TRAINED)
	@cp runs/editors/$*/curve.jsonl docs/editor-training/$*.jsonl
	@cp runs/editors/$*/$*.safetensors $@

atlas-search: $(VENV)/installed  ## Train variants of the bundled model and compare them, resumable; ARGS="--only heads-1"
	@$(BIN)/python -m factlens.atlas_search run $(ARGS)

atlas-facts: $(VENV)/installed-registries  ## Check the fact tables against registry packages
	@$(BIN)/python scripts/atlas_registries.py

clean:  ## Remove the environments and caches; runs/ stays
	@rm -rf $(VENV) .venv-3.9 .pytest_cache .mypy_cache .ruff_cache
