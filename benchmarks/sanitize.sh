#!/usr/bin/env bash
# Runs the kernels on small problems under compute-sanitizer, once for each tool; needs a GPU and the CUDA toolkit.
#
#     CCE_SANITIZE="memcheck racecheck synccheck" benchmarks/sanitize.sh [--only hopper-backward ...]
#
# Numba and CuPy probe the driver for functions that it may lack, which is no error of ours: hence --report-api-errors no.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in ${CCE_SANITIZE:-memcheck racecheck}; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 python -m benchmarks sanitize "$@"
done
