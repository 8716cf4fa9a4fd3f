#!/usr/bin/env bash
# Runs a command and tells by its exit status whether there is more to do: 143 if SIGTERM came, else the command's own.
#
#   launch/supervise.sh python -m eqm_jax.main --config=... --workdir=...
#
# A run that gets SIGTERM saves and exits with 0, as does one that has trained to the end. Whoever starts it again after
# a preemption has to tell the two apart: launch/tpu_worker.sh, launch/slurm.sbatch and launch/jobset.yaml ask this.
# With several processes it is enough that one of them was told: the others save too, and exit with 0.
# If STATUS_FILE names a file, the exit status is written there as well.
set -euo pipefail

if (($# == 0)); then
  echo "usage: ${0##*/} COMMAND [ARGUMENTS]; no command was given" >&2
  exit 2
fi

told='' child=''
pass_on() {
  told=yes
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap pass_on TERM INT

"$@" &
child=$!
[[ -z $told ]] || pass_on # it came before there was anyone to pass it on to

status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do # it was the signal that ended the waiting
  status=0
  wait "$child" || status=$?
done
[[ -z $told ]] || status=143
[[ -z ${STATUS_FILE:-} ]] || echo "$status" >"$STATUS_FILE"
exit "$status"
