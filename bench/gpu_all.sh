#!/usr/bin/env bash
# Everything that needs a GPU, in one call. PYTHON names the interpreter that holds torch and the package's dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m pytest -m gpu tests/test_gpu.py
