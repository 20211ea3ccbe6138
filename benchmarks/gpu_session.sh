#!/usr/bin/env bash
# Everything that needs a GPU, in one run of less than nine minutes and without a network:
#
#   benchmarks/gpu_session.sh [--output gpu_results] [--seconds 520] [--wheels FOLDER] [step...]
#
# gpu_session.py has the steps. PYTHON: the Python with a CUDA torch (python3).
# FASTPRUNE_GPU_DRY_RUN=1 goes through all steps on the CPU, with small shapes.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" benchmarks/gpu_session.py "$@"
