# `make train` and `make test` need nothing but Python 3.10+ with its venv module, on a machine that reaches a package index.
PYTHON ?= python3
# make venv TORCH=2.7.1: the newest torch with code for P100 (sm_60), and for drivers that CUDA 13 does not take
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
ifneq ($(filter-out 2.7.1,$(TORCH)),)
$(error TORCH is $(TORCH); accepted: 2.7.1, or nothing for the newest tested)
endif
CONSTRAINTS := $(if $(TORCH),constraints-torch27.txt,constraints.txt)
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadgroup --durations=12

.PHONY: train test test-slow test-compat ptx check docs bench gpu experiments gallery venv format constraints clean

train: $(VENV)/.core
	$(BIN)/python -m fastbegan train

test: $(VENV)/.dev
	$(PYTEST) -m "not slow and not nightly"

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

# The core of the suite in a second environment, with the torch and the Triton for P100 and for old drivers.
COMPAT := .venv-torch27
test-compat:
	@$(MAKE) --no-print-directory VENV=$(COMPAT) TORCH=2.7.1 $(COMPAT)/.dev
	$(COMPAT)/bin/python -m pytest -q -n auto --dist loadgroup -m core

# Modules whose public functions document every argument.
STEMS := conv2d_elu conv_stage equilibrium_update fold group_norm_silu l1_reconstruction_loss layers losses normalize_images \
	skip_phase_table upsample_conv2d_elu
DOCUMENTED := $(STEMS:%=kernels/fastbegan_kernels/%.py) \
	$(patsubst %,fastbegan/%.py,layers plain nets/models nets/hub convert/shell training/step)
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PYTHONPATH=.:kernels $(BIN)/lint-imports
	$(BIN)/pydoclint -q $(DOCUMENTED)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github/workflows
	$(BIN)/hadolint Dockerfile

# The site, into docs/_build/html; a link that leads nowhere fails.
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

# Execute the PTX of all shipped kernel configurations on this CPU: minutes (tests/ptx/README.md).
# make ptx TRITON=3.6.0 does it with another Triton, in a temporary folder; make ptx PTX="--record" keeps the results.
TRITON ?=
PTX ?=
ptx: $(VENV)/.dev
	@site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && \
	$(if $(TRITON),$(BIN)/python -m pip install -q --no-deps --target "$$site" triton==$(TRITON) &&) \
	env -u TRITON_INTERPRET PYTHONPATH="$$site:.:kernels" OMP_NUM_THREADS=1 \
	$(BIN)/python -m tests.ptx 60 80 90 100 --jobs 2 $(PTX)

bench: $(VENV)/.dev
	$(BIN)/python -m pytest bench/ --quick -q -s

# Kernels' tests and benchmarks on a GPU, with the libraries of PYTHON: nothing is installed. By hand, and so for each suite:
#   export PYTHONPATH=.:kernels
#   python -m pytest tests/kernels -n 8 --timeout 300 --timeout-method thread
#   python -m pytest bench/bench_step.py --budget 120 --results bench/results/gpu/rows.json
#   python -m fastbegan.measure.report bench/results/gpu
# Cross-compiling needs no GPU and is left out. A lost CUDA context ends its process: a worker of xdist, or one suite,
# whose rows are on disk by then.
OUT ?= bench/results/gpu
BUDGET ?= 120
WORKERS ?= 8
TESTS ?= tests/kernels --ignore tests/kernels/test_cross_compile.py
SUITES ?= step conv_stage forms upsample_conv2d_elu conv2d_elu group_norm_silu l1_reconstruction_loss normalize_images fold \
	skip_phase_table equilibrium_update accelerate train data startup
GPU_PYTEST := $(PYTHON) -m pytest -q -p no:cacheprovider --timeout 300 --timeout-method thread
gpu: export PYTHONPATH := .:kernels
gpu: export FASTBEGAN_CACHE = $(abspath $(OUT))/cache
gpu:
	@status=0; $(GPU_PYTEST) $(TESTS) -n $(WORKERS) || status=1; \
	for suite in $(SUITES); do $(GPU_PYTEST) bench/bench_$$suite.py --budget $(BUDGET) --results $(OUT)/rows.json || status=1; done; \
	$(PYTHON) -m fastbegan.measure.report $(OUT); exit $$status

# The paper's experiments at demo scale into experiments/, one after another. Runs side by side share all cores, a single
# run takes half of them.
experiments: $(VENV)/.dev
	$(BIN)/python -m pytest -q -s -m nightly tests/test_experiments.py

# docs/gallery/, from what `make experiments` left.
gallery: $(VENV)/.core
	$(BIN)/python docs/make_gallery.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# With TORCH= the environment is made anew for that version, and the other targets keep to it.
venv:
	$(if $(TORCH),rm -rf $(VENV))
	@$(MAKE) --no-print-directory $(VENV)/.core

$(VENV)/.core: pyproject.toml constraints.txt constraints-torch27.txt | $(VENV)/.made
	@echo "installing torch and the rest into $(VENV) (about 2 GB to fetch; some minutes, once)"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c $$(cat $(VENV)/.constraints) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing the test tools into $(VENV)"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c $$(cat $(VENV)/.constraints) -e ".[dev,$$(grep -q torch27 $(VENV)/.constraints && echo dali-cu12 || echo dali,nets)]"
	@touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10; try make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) has no working venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo $(CONSTRAINTS) > $(VENV)/.constraints
	@touch $@

# Resolve the newest versions again; needs uv. Python 3.10 to 3.13 each get what still supports them.
RESOLVE := uv pip compile -q --universal --upgrade --python-version 3.10 --extra dev --no-emit-package fastbegan \
	--no-annotate --no-header pyproject.toml
constraints:
	$(RESOLVE) --extra dali --extra eval --extra nets -o constraints.txt
	printf 'torch==2.7.1\nnumpy<2.4\n' | $(RESOLVE) --extra dali-cu12 -c - -o constraints-torch27.txt

clean:
	rm -rf $(VENV) $(COMPAT) .pytest_cache .ruff_cache .import_linter_cache dist build
