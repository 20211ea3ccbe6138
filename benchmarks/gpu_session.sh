#!/usr/bin/env bash
# Everything that needs a GPU, in one run and without a network: build the CUDA kernels, run all
# tests, check memory and races on the device, measure.
#
#   benchmarks/gpu_session.sh                     # all steps, in this order:
#   benchmarks/gpu_session.sh build test sanitize bench
#
# PYTHON  the Python that has a CUDA torch (python3)
# OUT     where logs and results go (gpu_results)
# BUILD   where the package is built and installed; kept, so that a second run is short (build/gpu)
# BENCH   which benchmarks, a pytest -k expression (cuda)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu_results}
BUILD=${BUILD:-$PWD/build/gpu}
BENCH=${BENCH:-cuda}
STEPS=${*:-build test sanitize bench}
CUDA_TESTS=tests/test_block_sparse_linear_cuda.py
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$BUILD/site${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$PATH:/usr/local/cuda/bin"
for step in $STEPS; do
  case $step in build | test | sanitize | bench) ;; *)
    echo "gpu_session.sh: unknown step '$step'" >&2
    exit 2
    ;;
  esac
done

mkdir -p "$OUT" "$BUILD"
OUT=$(cd "$OUT" && pwd)

# Whatever is missing is named at once, before any time on the GPU is spent.
"$PYTHON" - $STEPS <<'PYTHON_END'
import importlib.util, shutil, sys

steps = sys.argv[1:]
needs = {"torch": "torch", "numpy": "numpy", "safetensors": "safetensors", "tqdm": "tqdm"}
if "build" in steps:
    needs |= {"scikit_build_core": "scikit-build-core", "pybind11": "pybind11"}
if {"test", "sanitize", "bench"} & set(steps):
    needs |= {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "hypothesis": "hypothesis"}
missing = [package for module, package in needs.items() if importlib.util.find_spec(module) is None]
if "build" in steps:
    for program, package in (("nvcc", "the CUDA toolkit"), ("cmake", "cmake"), ("ninja", "ninja"), ("g++", "g++")):
        # cmake and ninja may come as programs or as Python packages.
        if shutil.which(program) is None and importlib.util.find_spec(program) is None:
            missing.append(f"{program} ({package})" if package != program else program)
if missing:
    sys.exit("gpu_session.sh: missing: " + ", ".join(missing))
import torch

if torch.version.cuda is None:
    sys.exit(f"gpu_session.sh: torch {torch.__version__} has no CUDA")
if not torch.cuda.is_available():
    sys.exit("gpu_session.sh: torch sees no GPU")
PYTHON_END

say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

build() {
  local architecture
  architecture=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --upgrade --target "$BUILD/site" \
    --config-settings=build-dir="$BUILD/cmake" --config-settings=cmake.define.FASTPRUNE_CUDA=ON \
    --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$architecture" . >"$OUT/build.log" 2>&1 ||
    { tail -n 40 "$OUT/build.log"; return 1; }
  "$PYTHON" - <<'PYTHON_END' | tee "$OUT/machine.txt"
import torch
import fastprune as fp

for name, value in fp.build_info().items():
    print(f"{name}: {value}")
properties = torch.cuda.get_device_properties(0)
print(f"{properties.name}: {properties.multi_processor_count} multiprocessors, "
      f"{properties.total_memory >> 20} MiB, compute capability {properties.major}.{properties.minor}")
PYTHON_END
  nvidia-smi --query-gpu=driver_version,clocks.max.sm,power.limit --format=csv | tee -a "$OUT/machine.txt" || true
}

test_all() {
  "$PYTHON" -m pytest -p no:cacheprovider -q -rs tests 2>&1 | tee "$OUT/tests.txt"
  # Skipped GPU tests must not look like passed ones.
  "$PYTHON" -m pytest -p no:cacheprovider -q -rs "$CUDA_TESTS" 2>&1 | tee "$OUT/cuda_tests.txt"
  grep -q ' passed' "$OUT/cuda_tests.txt"
}

# Without torch's caching every tensor is an allocation of its own, so that a read past its end is
# seen. The largest shapes would run for minutes and add nothing.
sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on the PATH: skipped" | tee "$OUT/sanitizer.txt"
    return
  fi
  : >"$OUT/sanitizer.txt"
  local tool
  for tool in memcheck racecheck synccheck; do
    echo "-- $tool" | tee -a "$OUT/sanitizer.txt"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -p no:cacheprovider -q "$CUDA_TESTS" \
      -k '(ugly and 0.3) or bias_and_activation or layout or relu' 2>&1 | tee -a "$OUT/sanitizer.txt"
  done
}

bench() {
  "$PYTHON" -m pytest -p no:cacheprovider -q benchmarks -k "$BENCH" --benchmark-enable --benchmark-only \
    --benchmark-columns=median,iqr,rounds --benchmark-json="$OUT/benchmark.json" \
    >"$OUT/benchmark.log" 2>&1 || { tail -n 40 "$OUT/benchmark.log"; return 1; }
  "$PYTHON" benchmarks/report.py "$OUT/benchmark.json" | tee "$OUT/benchmark.txt"
}

for step in $STEPS; do
  say "$step"
  case $step in
  build) build ;;
  test) test_all ;;
  sanitize) sanitize ;;
  bench) bench ;;
  esac
done
say "done; results are in $OUT"
