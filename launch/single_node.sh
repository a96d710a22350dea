#!/usr/bin/env bash
# Train on all GPUs of this machine:  bash launch/single_node.sh --deepspeed ds_configs/zero3.json --model_name ... [settings]
# NUM_GPUS=2 uses fewer, or that many ranks on the CPU. Uses .venv if it exists. See launch/README.md.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
use_environment
trap end_groups EXIT
OUTPUT_DIR=$(settings output_dir "$@") || exit
forward_signals
run_ranks "${NUM_GPUS:-$((GPUS > 0 ? GPUS : 1))}" "$OUTPUT_DIR/logs" "$@"
CODE=$?
[ -z "$STOP_SIGNAL" ] || [ $CODE != 0 ] || exit $((128 + $(kill -l "$STOP_SIGNAL")))
exit $CODE
