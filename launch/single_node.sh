#!/usr/bin/env bash
# Train on all GPUs of this machine:  bash launch/single_node.sh --deepspeed ds_configs/zero3.json --model_name ... [settings]
# NUM_GPUS=2 takes fewer, or that many ranks on the CPU. Uses .venv where there is one.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck disable=SC1091
[ -f .venv/bin/activate ] && source .venv/bin/activate
command -v deepspeed >/dev/null || die "no deepspeed on PATH: pip install -r requirements.txt, or activate your environment"
trap end_groups EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
run_ranks ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} train.py "$@"
