#!/usr/bin/env bash
# Everything that bardlet measures on one GPU, in under 10 minutes; options: see the top of benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -u benchmarks/gpu.py "$@"
