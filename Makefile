# make demo, test, lint, bench, cuda-check: each makes or reuses .venv first.
#   PYTHON=python3.12   the Python that .venv is made with
#   TORCH=...           what pip installs as torch: a version, a wheel file, an empty string to keep
#                       the one that .venv has
#   CUDA_CHECK_ARCHITECTURES="80 86 89 90 100 120"   what cuda-check compiles for, here for a release

PYTHON ?= python3
TORCH ?= torch==2.13.0
BUILD_TOOLS := "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.26" ninja
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || echo 2)

VENV := .venv
BIN := $(VENV)/bin
NATIVE := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)
CPP := $(shell find csrc tests/cpp -type f)

.PHONY: demo test lint format bench cuda-check clean FORCE

demo: $(VENV)/installed
	$(BIN)/python -m fastprune demo $(DEMO_ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(VENV)/installed $(VENV)/lint-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/lint-tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only -q \
	  --benchmark-columns=median,iqr,rounds --benchmark-json=benchmark.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/report.py benchmark.json

# Compiles every .cu, holds it against tests/ptx/budgets.py, and runs the compiled PTX where the
# simulator is at hand. Needs nvcc, no GPU and no CUDA torch.
CUDA_CHECK_ARCHITECTURES ?= 80 90
cuda-check: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m ptx.cuda_check --architectures $(CUDA_CHECK_ARCHITECTURES) \
	  --output build/cuda-check --jobs $(CMAKE_BUILD_PARALLEL_LEVEL)

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks benchmark.json

# Rewritten, and so newer than what depends on it, only when TORCH changed.
$(VENV)/torch: FORCE
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH)" ] && [ "$$(cat $@ 2>/dev/null)" != "$(TORCH)" ]; then \
	  echo "installing $(TORCH) and the build tools into $(VENV)" && \
	  $(BIN)/python -m pip install --quiet $(TORCH) $(BUILD_TOOLS) && \
	  printf '%s' "$(TORCH)" > $@; \
	elif [ ! -e $@ ]; then \
	  $(BIN)/python -m pip install --quiet $(BUILD_TOOLS) && touch $@; \
	fi

# Editable: changes of Python files count at once, changes of C++ files rebuild here.
$(VENV)/installed: $(VENV)/torch $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,demo]"
	touch $@

$(VENV)/lint-tools: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet "ruff>=0.6" "mypy>=1.11" "clang-format>=18" "pre-commit>=3"
	touch $@
