#!/usr/bin/env bash
# `make gpu`: on a machine with a GPU, its own python, torch and CUDA; installs nothing. Builds, tests, measures, in at most $MINUTES,
# or eight; the table comes last. Result files go to $OUT, or to benchmarks/results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu --out "${OUT:-benchmarks/results}" --minutes "${MINUTES:-8}" "$@"
