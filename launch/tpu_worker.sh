#!/usr/bin/env bash
# What each worker of a TPU does; launch/tpu_pod.sh copies the code there and calls this over ssh. Beside the code lie
#
#   venv/       the Python environment
#   storage/    data/ and runs/ of the code are in here, and compiled programs; with a bucket, it is the bucket
#   log         of the run (log.previous: of the one before)
#   flags, lock, pid, status, stopped     what runs; held while it runs; its process; its exit status; a wish
#
#   install [BUCKET [SETUP]]   run the script SETUP, install the package, mount the bucket
#   start FLAGS                start eqm_jax.main with these flags, apart from this ssh connection
#   status                     one line: running, exit N, stopped (as asked), lost (with the machine), or idle
#   follow LINES               print the log from LINES lines before its end (or from line +N) until the run ends
#   tail                       print the end of the log, if the run did not end well
#   stop                       have the run save and end
set -euo pipefail
self=$(realpath "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$(dirname "$self")/common.sh"
cd "$(dirname "$self")/../.."

install() { # [BUCKET [SETUP]]
  local bucket=${1:-} setup=${2:-}
  [[ -z $setup ]] || (cd code && bash "$setup")
  [[ -x venv/bin/python ]] || make_venv
  venv/bin/python -m pip install --quiet "./code[tpu]"
  mkdir -p storage
  [[ -z $bucket ]] || mount_bucket "$bucket"
  mkdir -p storage/data storage/runs
  ln -sfn ../storage/data code/data
  ln -sfn ../storage/runs code/runs
}

make_venv() {
  for version in 3.13 3.12 3.11; do
    if command -v "python$version" >/dev/null && "python$version" -m venv venv; then return; fi
  done
  # The images of TPU VMs come with Python 3.10, which is too old; uv fetches a newer one.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --clear --seed --python 3.12 venv
}

mount_bucket() { # BUCKET
  if mountpoint --quiet storage; then return; fi
  if ! command -v gcsfuse >/dev/null && ! sudo apt-get install --yes --quiet gcsfuse; then
    echo "gcsfuse is not installed, and apt-get does not know it: install it in a script, given as --setup=FILE" >&2
    exit 1
  fi
  # A checkpoint becomes final when its directory is renamed. Several workers write: none may trust what it remembers.
  gcsfuse --log-file="$PWD/gcsfuse.log" --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$1" storage
}

is_running() {
  ! flock --shared --nonblock lock true # shared, so that those who ask do not see each other
}

start() { # FLAGS
  if is_running; then
    if [[ $(<flags) == "$(quoted "$@")" ]]; then return; fi
    echo "another run is going on, with $(<flags): stop it first" >&2
    exit 3
  fi
  quoted "$@" >flags
  rm -f status stopped
  [[ ! -e log ]] || mv log log.previous
  setsid bash "$self" supervise "$@" </dev/null >>log 2>&1 &
  until is_running || [[ -e status ]]; do
    kill -0 $! 2>/dev/null || [[ -e status ]] || { tail log >&2 && exit 1; }
    sleep 0.1
  done
}

supervise() { # FLAGS
  exec 9>lock
  flock --wait 10 9 # not at once: someone may be asking whether it is held
  echo $$ >pid
  export JAX_COMPILATION_CACHE_DIR=$PWD/storage/compiled # a new TPU finds there what the last one compiled
  cd code
  # The lock is of this process alone: what the run may leave behind does not hold it.
  STATUS_FILE=$PWD/../status exec bash launch/supervise.sh bash -c 'exec "$@" 9>&-' bash \
    ../venv/bin/python -m eqm_jax.main "$@"
}

report() {
  if is_running; then
    echo running
  elif [[ -e stopped ]] && [[ ! -e status || $(<status) == 143 ]]; then
    echo stopped
  elif [[ -e status ]]; then
    echo "exit $(<status)"
  elif [[ -e flags ]]; then
    echo lost
  else
    echo idle
  fi
}

follow() { # LINES
  if is_running; then
    tail --lines="$1" --follow=name --retry --pid="$(<pid)" --sleep-interval=0.2 log
  else
    tail --lines="$1" log
  fi
}

case ${1:-} in
  install | start | supervise | follow) "$@" ;;
  status) report ;;
  tail)
    [[ $(report) == "exit 0" ]] || tail --lines=40 log | sed "s/^/[worker ${HOSTNAME##*-}] /"
    ;;
  stop)
    touch stopped
    ! is_running || kill -TERM "$(<pid)"
    ;;
  *) usage_error "install, start, status, follow, tail or stop, not '${1:-}'" ;;
esac
