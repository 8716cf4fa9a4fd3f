#!/usr/bin/env bash
# Trains on a Cloud TPU, one host or many: makes the TPU, copies the code, installs, starts the run on all workers,
# follows its log, and after a preemption makes the TPU anew and starts the same run, which goes on from its newest
# checkpoint.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --type=TYPE [options] [COMMAND] -- FLAGS OF eqm_jax.main
#
#   launch/tpu_pod.sh --name=xl2 --zone=us-west4-a --type=v5litepod-64 --spot --queued --bucket=my-bucket -- \
#     --config=configs/imagenet256.py --workdir=runs/xl2
#
# Commands
#   run       all of the above (what is done without a command). The run does not need this script: it goes on when the
#             connection or this machine fails; the same command then attaches to it. A TPU that is there is used.
#   logs      follow the log of one worker
#   status    the state of the TPU, and of the run on each worker
#   stop      have the run save and end; the TPU stays
#   delete    delete the TPU
#
# Options
#   --name=NAME --zone=ZONE --project=PROJECT     of the TPU; without a project that of gcloud's configuration
#   --type=TYPE           accelerator type: v4-32, v5litepod-16, v5p-32, v6e-16, ...
#   --version=VERSION     runtime version, if not the usual one of the type
#   --spot                cheaper, and may be preempted
#   --queued              wait in the queue of Cloud TPU for as long as there is no such TPU (a queued resource)
#   --bucket=BUCKET       Cloud Storage bucket, mounted on all workers with gcsfuse. The directories data/ and runs/
#                         that FLAGS name are then in the bucket. Without it they are on each worker's own disk: enough
#                         for a single worker, but it is deleted together with the TPU.
#                         A bucket with a hierarchical namespace renames checkpoints at once, others file by file.
#   --setup=FILE          script of this repository that each worker runs before installing, from the repository's root
#   --create-flag=FLAG    more for `gcloud ... create`, such as --create-flag=--reserved; any number of times
#   --ssh-flag=FLAG       more for `gcloud ... ssh` and `scp`, such as --ssh-flag=--internal-ip; any number of times
#   --worker=N            of `logs` (0)
#   --poll=SECONDS        how often to look (30)
#   --dry-run             print the commands instead of running them
#
# The files that git tracks are copied, as they are now: `git add` new ones. What FLAGS name is relative to the code.
# Exit status of run: 0 trained to the end, 1 failed or stopped, 2 wrong usage. Until `delete` the TPU stays, and costs.
# Needs gcloud (logged in), git and bash 4.4. The service account of the TPU must be allowed to write to the bucket.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$launch/.."

# ---------------------------------------------------------------- what is asked
name='' zone='' project='' type='' version='' bucket='' setup='' spot='' queued='' worker=0 poll=30 command=''
create_flags=() ssh_flags=()
while (($#)); do
  case $1 in
    --help) show_help && exit ;;
    --dry-run) dry_run=yes ;;
    --spot) spot=yes ;;
    --queued) queued=yes ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --create-flag=*) create_flags+=("${1#*=}") ;;
    --ssh-flag=*) ssh_flags+=("${1#*=}") ;;
    --) shift && break ;;
    -*) usage_error "unknown option '$1' (see --help); flags of eqm_jax.main come after --" ;;
    run | logs | status | stop | delete)
      [[ -z $command ]] || usage_error "two commands, '$command' and '$1'"
      command=$1
      ;;
    *) usage_error "unknown command '$1': run, logs, status, stop or delete" ;;
  esac
  shift
done
command=${command:-run}

[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || usage_error "--name: letters, digits and hyphens, not '$name'"
[[ $zone ]] || usage_error "--zone is missing"
[[ $worker =~ ^[0-9]+$ ]] || usage_error "--worker is a number, not '$worker'"
[[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage_error "--poll is a number of seconds, not '$poll'"
[[ $bucket =~ ^([a-z0-9][-a-z0-9_.]*)?$ ]] || usage_error "--bucket is a name without gs://, not '$bucket'"
if [[ $command == run ]]; then
  [[ $type ]] || usage_error "--type is missing"
  [[ -z $setup ]] || git ls-files --error-unmatch "$setup" >/dev/null 2>&1 ||
    usage_error "--setup: git tracks no file '$setup' in $PWD"
  for needed in --config --workdir; do
    [[ " $*" == *" $needed="* ]] || usage_error "$needed=... of eqm_jax.main is missing after --"
  done
  [[ $version ]] || case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    *) usage_error "--version is needed for --type=$type" ;;
  esac
elif (($#)); then
  usage_error "flags of eqm_jax.main are for run, not for $command: '$1'"
fi

# ---------------------------------------------------------------- gcloud
where=("--zone=$zone" ${project:+"--project=$project"} --quiet)
archive=build/$name.tar.gz
worker_script="bash eqm_jax/code/launch/tpu_worker.sh"
had_tpu=''

say() {
  printf '%(%H:%M:%S)T %s\n' -1 "$1" >&2
}

pause() {
  [[ $dry_run ]] || sleep "$poll"
}

# Prints the state of the TPU, READY when it can be used, or nothing if there is none; fails if that is not known.
tpu_state() {
  local state=ACTIVE
  local these=("--filter=name~/$name\$" "${where[@]}") # list, not describe: what is not there is no error
  if [[ $queued ]]; then
    state=$(run gcloud compute tpus queued-resources list --format='value(state.state)' "${these[@]}") || return
  fi
  if [[ $state == ACTIVE ]]; then
    state=$(run gcloud compute tpus tpu-vm list --format='value(state)' "${these[@]}") || return
    [[ $state || -z $queued ]] || state=ACTIVE # not there yet, or no more
  fi
  echo "$state"
}

create_tpu() {
  local what=("--accelerator-type=$type" ${spot:+--spot} "${create_flags[@]}" "${where[@]}")
  if [[ $queued ]]; then
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" --runtime-version="$version" "${what[@]}"
  else
    run gcloud compute tpus tpu-vm create "$name" --version="$version" "${what[@]}"
  fi
}

delete_tpu() {
  if [[ $queued ]]; then
    run gcloud compute tpus queued-resources delete "$name" --force "${where[@]}"
  else
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}"
  fi
}

# A connection that is dead is noticed after two minutes; gcloud then tries ten times to connect.
on_workers() { # WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2" --ssh-flag=-oConnectTimeout=20 \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 "${ssh_flags[@]}" "${where[@]}"
}

# ---------------------------------------------------------------- the steps of a run
# Returns when the TPU is READY, having made it if need be; fails if there was none and none could be made.
make_ready() {
  local state before=''
  while true; do
    if ! state=$(tpu_state); then
      [[ $had_tpu ]] || return 1
      say "cannot ask for the state of the TPU; trying again"
      pause
      continue
    fi
    [[ -z $state ]] || had_tpu=yes
    case $state in
      READY) return ;;
      '')
        say "creating $name: $type, $version"
        if ! create_tpu; then
          [[ $had_tpu ]] || return 1
          say "it cannot be created now; trying again"
          pause
        fi
        had_tpu=yes
        ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        say "the TPU is $state: deleting it"
        delete_tpu || pause
        ;;
      FAILED | STOPPED | HIDDEN | UNKNOWN)
        say "the TPU is $state, which this script does not mend"
        return 1
        ;;
      *)
        [[ $state == "$before" ]] || say "the TPU is $state; waiting"
        pause
        ;;
    esac
    before=$state
  done
}

pack() {
  run mkdir -p build
  # shellcheck disable=SC2016 # $1 is for that shell
  run bash -o pipefail -c 'git ls-files -z | tar --null --files-from=- --create --gzip --file="$1"' pack "$archive"
}

start_run() { # FLAGS
  local found=''
  found=$(on_workers all "$worker_script status 2>/dev/null || echo idle") || return
  if [[ $found != *running* ]]; then # nothing is changed under a run that is going on
    run gcloud compute tpus tpu-vm scp "$archive" "$name:eqm_jax.tar.gz" --worker=all "${ssh_flags[@]}" \
      "${where[@]}" || return
    on_workers all "rm -rf eqm_jax/code && mkdir -p eqm_jax/code && tar -xzf eqm_jax.tar.gz -C eqm_jax/code \
&& $worker_script install $(quoted "$bucket" "$setup")" || return
  fi
  on_workers all "$worker_script start $(quoted "$@")"
}

# Prints what became of the run: running, finished, stopped, interrupted, failed, or unreachable.
judge() {
  local found
  found=$(on_workers all "$worker_script status") || { echo unreachable && return; }
  case $'\n'$found in
    *$'\n'running*) echo running ;;
    *$'\n'stopped*) echo stopped ;;
    # Told to end, with its machine or before it. The others have then saved as well, or failed for want of it.
    *$'\n'"exit 143"* | *$'\n'lost* | *$'\n'idle*) echo interrupted ;;
    *) if grep --quiet --invert-match '^exit 0$' <<<"$found"; then echo failed; else echo finished; fi ;;
  esac
}

# Succeeds if the TPU turns out to be gone: that is known somewhat later than the run feels it.
is_gone() {
  local state
  for _ in 1 2 3 4 5 6; do
    if state=$(tpu_state) && [[ $state != READY ]]; then return 0; fi
    pause
  done
  return 1
}

# Follows the log until there is a verdict, which it sets, or the TPU is gone.
follow_run() {
  local lines=+1 state
  while true; do
    on_workers 0 "$worker_script follow $lines" || true
    lines=5
    verdict=$(judge)
    case $verdict in running | unreachable) ;; *) return ;; esac
    if state=$(tpu_state) && [[ $state != READY ]]; then return; fi
    [[ $verdict == running ]] || say "cannot reach the workers; trying again"
    pause
  done
}

run_to_the_end() { # FLAGS
  local failures=0 status verdict
  [[ $bucket ]] || say "without --bucket the workdir is deleted together with the TPU"
  pack
  trap 'say "the run goes on without this script: the same command attaches to it, stop ends it"; exit 130' INT
  while true; do
    make_ready || exit 1
    status=0
    start_run "$@" || status=$?
    if ((status)); then
      if ((status == 3 || ++failures == 3)); then
        say "the run could not be started"
        exit 1
      fi
      pause
      continue # make_ready sees whether the TPU is gone
    fi
    failures=0
    follow_run
    case $verdict in
      finished)
        say "trained to the end"
        say "to delete the TPU: launch/tpu_pod.sh --name=$name --zone=$zone${queued:+ --queued} delete"
        exit
        ;;
      stopped)
        say "stopped as asked; the same command goes on"
        exit 1
        ;;
      failed)
        if ! is_gone; then
          on_workers all "$worker_script tail" || true
          say "the run failed; above are the ends of the logs"
          exit 1
        fi
        ;;
      interrupted)
        is_gone || true # what told it to end will have been the end of the TPU, or a restart of its machines
        ;;
    esac
    say "interrupted: the same run is started again"
  done
}

dry_run_to_the_end() { # FLAGS
  pack
  tpu_state >/dev/null
  create_tpu
  start_run "$@"
  on_workers 0 "$worker_script follow +1"
  judge >/dev/null
  echo "# after a preemption this, and all but the packing once more:"
  delete_tpu
}

case $command in
  run) if [[ $dry_run ]]; then dry_run_to_the_end "$@"; else run_to_the_end "$@"; fi ;;
  logs) on_workers "$worker" "$worker_script follow +1" ;;
  status)
    tpu_state
    on_workers all "$worker_script status"
    ;;
  stop) on_workers all "$worker_script stop" ;;
  delete) delete_tpu ;;
esac
