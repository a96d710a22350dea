#!/usr/bin/env bash
# Train on all GPUs of this machine:  bash launch/single_node.sh --deepspeed ds_configs/zero3.json --model_name ... [settings]
# NUM_GPUS=2 takes fewer, or that many ranks on the CPU. Uses .venv where there is one. See launch/README.md.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
use_environment
trap end_groups EXIT
OUTPUT_DIR=$(settings output_dir "$@") || exit
pass_signals_on
run_ranks "${NUM_GPUS:-$((GPUS > 0 ? GPUS : 1))}" "$OUTPUT_DIR/logs" "$@"
CODE=$?
[ -z "$ASKED_BY" ] || [ $CODE != 0 ] || exit $((128 + $(kill -l "$ASKED_BY")))
exit $CODE
