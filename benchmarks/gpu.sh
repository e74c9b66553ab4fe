#!/usr/bin/env bash
# Everything that bardlet measures on one GPU, meant to take under 10 minutes; options: see the top of benchmarks/gpu.py.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"  # this shell stays where it is: paths that are given are relative to that
PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -u "$root/benchmarks/gpu.py" "$@"
