#!/usr/bin/env bash
# All of bardlet's GPU benchmarks, on one GPU: about 7 minutes on an H200; for options see the top of benchmarks/gpu.py.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"  # no cd: paths in the arguments are relative to the current folder
PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -u "$root/benchmarks/gpu.py" "$@"
