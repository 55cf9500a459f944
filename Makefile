# `make demo` and `make test` need nothing done before them: they make their own environment in .venv.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint .constraints.txt
# By all cores, which pip does not use; torch has a file for a newer Python.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
DEMO_CORPUS := corpora/bach
TEST_PACKAGES := chromium faketime git mariadb-server munge postgresql-15 rsync slurm-wlm slurmdbd

# More than cores, since many tests wait for servers.
WORKERS := 3
# Tests of one room, `make test ROOM=analysis`: the folder of that name below tests/.
ROOM_TESTS = $(if $(ROOM),$(or $(wildcard tests/$(ROOM) tests/*/$(ROOM)),$(error tests/ has no folder $(ROOM))))
IN_PARALLEL := --dist loadfile --no-loadscope-reorder

# Where a machine sets this, every process that starts would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test quick check verify gpu bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo  ## a small scaling study on real music, end to end
	$(BIN)/ssmscale data build --source bach --out $(DEMO_CORPUS) --limit 220 --segment-seconds 5.12 \
	    --codebooks 2 --codebook-size 256
	$(BIN)/ssmscale submit sweeps/demo.yaml --on local
	$(BIN)/ssmscale report sweeps/demo.yaml --law auto --out report

test: $(VENV)/.dev  ## every test; Debian packages they need are installed where that is allowed
	sh .ci/debian $(TEST_PACKAGES)
	$(BIN)/python -m pytest -n $(WORKERS) $(IN_PARALLEL) -m "not verify and not gpu" $(ROOM_TESTS)

quick: $(VENV)/.dev  ## tests that start no server, cluster or training and write no report
	$(BIN)/python -m pytest -n auto $(IN_PARALLEL) -m "quick and not verify and not gpu"

check: $(VENV)/.dev  ## format, lint, types, import rules, plain English
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.plain_english

verify: $(VENV)/.dev $(VENV)/.kernels  ## checks that repeat, at their full counts; CUDA kernels in Triton's interpreter
	$(BIN)/python -m pytest -m verify

gpu: $(VENV)/.dev  ## kernels, speed, memory and whole studies on this machine's GPU, against what was predicted
	$(BIN)/python -m tests.gpu machine
	sh .ci/kernels $(BIN)/python
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m tests.gpu

bench: $(VENV)/.dev  ## what is claimed of speed, both sides in one run
	$(BIN)/python -m tests.benchmarks

clean:  ## the environment and caches; runs, corpora and reports stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.torch: .constraints.txt .ci/venv
	sh .ci/venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[train,analysis,audio]'
	$(COMPILE)
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[train,analysis,audio,codecs,prebuilt,serve,slurm,ray,tune,dev]'
	$(COMPILE)
	touch $@

# The Python part of the kernels, in a folder of its own: torch and transformers would try to use it without a GPU.
$(VENV)/.kernels: $(VENV)/.dev
	$(PIP) 'setuptools>=77' wheel packaging
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
	    $(PIP) --no-deps --no-build-isolation --upgrade --target $(VENV)/kernels \
	    triton==3.7.1 mamba-ssm causal-conv1d einops
	touch $@
