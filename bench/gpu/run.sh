#!/bin/sh
# Checks the kernels on this machine's GPU and measures them, in under ten minutes; see run.py.
# Needs torch, triton, transformers, safetensors and pytest; no network. The results go to the folder
# named by the first argument (default bench/results). With --smoke, all of it tiny on a CPU.
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m deltaserve.bench.gpu.run "$@"
