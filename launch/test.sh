#!/usr/bin/env bash
# Set up .venv and run the tests that need no GPU:  bash launch/test.sh [--all] [pytest arguments]
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment tests/requirements.txt
python -m pytest "$@"
