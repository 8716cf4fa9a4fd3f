#!/usr/bin/env bash
# Runs eqm_jax.main on pretended devices of this machine's CPU, to try a mesh or several processes without accelerators.
#
#   launch/local.sh [options] --config=FILE --workdir=DIR [more flags of eqm_jax.main]
#
#   --processes=P   processes, which find each other on a free port of this machine (1)
#   --devices=D     devices of each process (1)
#   --grace=S       when one process has failed, seconds until the others, which notice by themselves, are stopped (10)
#   --dry-run       print the commands instead of running them
#
# PYTHON names the Python to use, if not `python`. What processes I > 0 print goes to stderr, as lines that begin with
# "[I] ". SIGINT and SIGTERM are passed on to all. The exit status is that of the process that failed first.
#
#   launch/local.sh --devices=8 --config=configs/digits.py --workdir=runs/digits8 --config.mesh.fsdp=8
#   launch/local.sh --processes=2 --config=configs/digits.py --workdir=runs/digits2 --config.mesh.data=-1
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=1 devices=1 grace=10 flags=()
usage="usage: launch/local.sh [--dry-run] [--processes=P] [--devices=D] --config=FILE --workdir=DIR [more flags]"
number() { # NAME VALUE: checks a count
  [[ $2 =~ ^[1-9][0-9]*$ ]] || usage_error "$usage; $1 is a number, not '$2'"
}
for argument; do
  case $argument in
    --help) show_help && exit ;;
    --dry-run) dry_run=yes ;;
    --processes=*) processes=${argument#*=} ;;
    --devices=*) devices=${argument#*=} ;;
    --grace=*) grace=${argument#*=} ;;
    --*) flags+=("$argument") ;;
    *) usage_error "$usage; not '$argument'" ;;
  esac
done
number --processes "$processes"
number --devices "$devices"
number --grace "$grace"
for needed in --config --workdir; do
  [[ " ${flags[*]-}" == *" $needed="* ]] || usage_error "$usage; $needed is missing"
done

xla_flags="--xla_force_host_platform_device_count=$devices${XLA_FLAGS:+ $XLA_FLAGS}"
command=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$xla_flags" "${PYTHON:-python}" -m eqm_jax.main "${flags[@]}")

if ((processes == 1)); then
  [[ $dry_run ]] || exec "${command[@]}"
  run "${command[@]}"
  exit
fi

# A port below those that the system gives to outgoing connections, so that none of them takes it in the meantime.
port=$((10000 + RANDOM % 20000))
while (exec 4<>"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((10000 + RANDOM % 20000)); done
rank() { # I: the command of process I
  rank=("${command[@]}" "--coordinator_address=localhost:$port" "--num_processes=$processes" "--process_id=$1")
}
if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    rank "$i"
    echo "$(quoted "${rank[@]}") &"
  done
  echo wait
  exit
fi

pids=() labels=()
pass_on() { # SIGNAL
  for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM

set -m # or bash would have its background processes ignore SIGINT
for ((i = 0; i < processes; i++)); do
  rank "$i"
  if ((i == 0)); then
    "${rank[@]}" </dev/null &
  else
    exec {label}> >(trap '' INT TERM && exec sed -u "s/^/[$i] /" >&2)
    labels+=($!)
    "${rank[@]}" </dev/null >&"$label" 2>&1 {label}>&- &
    exec {label}>&-
  fi
  pids[i]=$!
done

status=0 failed_at=
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    ended=0
    wait "${pids[i]}" || ended=$?
    unset "pids[i]"
    if ((ended && !status)); then
      status=$ended failed_at=$SECONDS
      echo "process $i failed with exit status $ended" >&2
    fi
  done
  # SECONDS counts whole ones: only a larger difference means that all of the time is over.
  if [[ $failed_at ]] && ((SECONDS - failed_at > 2 * grace)); then
    pass_on KILL # it tries to save together with one that is no more
  elif [[ $failed_at ]] && ((SECONDS - failed_at > grace)); then
    pass_on TERM
  fi
  sleep 0.2
done
wait "${labels[@]}" || true # the last lines are out
exit "$status"
