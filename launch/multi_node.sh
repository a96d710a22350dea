#!/usr/bin/env bash
# Train on the hosts of a hostfile ("name slots=8" a line), from any machine that reaches them by ssh without a password:
#   bash launch/multi_node.sh HOSTFILE --deepspeed ds_configs/zero3.json --model_name ... [settings]
# Checks every host first, then starts launch/single_node.sh on each by pdsh. See launch/README.md.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
use_environment
OUTPUT_DIR=$(settings output_dir "${@:2}") || exit
exec python launch/hosts.py "$OUTPUT_DIR" "$@"
