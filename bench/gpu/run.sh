#!/bin/sh
# Checks the kernels on this machine's GPU and measures them, in under ten minutes:
# pytest -m gpu, then the kernel table. Needs torch, triton, transformers, safetensors and pytest;
# no network. The results go to the folder named by the first argument (default bench/results).
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
results=${1:-bench/results}
mkdir -p "$results"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

status=0
"$python" -m pytest -q -m gpu tests/gpu || status=$?
"$python" -m deltaserve.bench.gpu.kernels --out "$results/gpu_kernels.json"
exit "$status"
