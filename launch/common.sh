# shellcheck shell=bash
# Sourced by the scripts beside it: how they tell a mistake, and what --dry-run does.

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dry_run=
exec 3>&1 # where a dry run prints, also from inside $(...)

# One line about a mistake of the one who called; exit status 2.
usage_error() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# Prints the words of a command so that a shell reads them back as they are.
quoted() {
  local word line='' quote="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%,+-]+$ ]] || word=\'${word//\'/$quote}\'
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command; in a dry run prints it instead, to be copied.
run() {
  if [[ $dry_run ]]; then
    quoted "$@" >&3
  else
    "$@" </dev/null # ssh would swallow what is typed, and a loop's input
  fi
}

# Prints the comment at the top of the script.
show_help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$launch/${0##*/}"
}
