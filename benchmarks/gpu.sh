#!/usr/bin/env bash
# One call on a machine with an NVIDIA GPU, under nine minutes: is wsft right there, how fast is it, where does the time go.
#   bash benchmarks/gpu.sh [OUT] [--tiny]          --tiny: every stage in small sizes, also on a CPU
# Installs the wheels of runs/wheels (gpu_wheels.sh) if they are there. Stages and results: benchmarks/gpu.py.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PYTHON=python3
if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
if compgen -G "runs/wheels/*.whl" >/dev/null; then
  # into the interpreter's own environment, since tests replace PYTHONPATH
  "$PYTHON" -m pip install -q --no-index --no-deps --break-system-packages runs/wheels/*.whl || exit
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
