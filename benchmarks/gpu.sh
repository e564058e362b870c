#!/usr/bin/env bash
# `make gpu`: on a machine with a GPU, its own python, torch and CUDA; installs nothing. Builds, tests, measures; the table comes last.
# Result files go to $OUT, or to benchmarks/results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "make gpu: this torch sees no CUDA device")'
export SETEMB_CUDA=1 PYTHONUNBUFFERED=1
"$python" setup.py build_ext --inplace >"$out/build.log" 2>&1 || { tail -n 40 "$out/build.log"; exit 1; }
"$python" -m setemb_kernels
"$python" -m pytest tests/kernels -x -p no:cacheprovider 2>&1 | tee "$out/tests.log" | tail -n 30
"$python" -m pytest benchmarks -k gpu --results "$out" --benchmark-quiet -p no:cacheprovider 2>&1 | tee "$out/bench.log" | tail -n 30
