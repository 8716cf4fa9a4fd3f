#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster: fills in launch/jobset.yaml and applies it.
#
#   launch/gke.sh --name=NAME --image=IMAGE --bucket=BUCKET [options] -- FLAGS OF eqm_jax.main
#
#   launch/gke.sh --name=xl2 --image=REGISTRY/eqm_jax --bucket=my-bucket -- \
#     --config=configs/imagenet256.py --workdir=runs/xl2
#
# Options
#   --name=NAME              of the JobSet
#   --image=IMAGE            built from launch/Dockerfile
#   --bucket=BUCKET          Cloud Storage bucket; the directories data/ and runs/ that FLAGS name are in it. One with a
#                            hierarchical namespace renames checkpoints at once, others file by file.
#   --accelerator=NAME       GKE's name of the TPU: tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#                            (tpu-v5-lite-podslice)
#   --topology=AxB[xC]       chips of the slice (4x4)
#   --chips=N                chips of a host (4); hosts are the slice's chips divided by it
#   --slices=N               slices that train together (1), each of that topology and in a node pool of its own. GKE
#                            tells the pods of each other; --config.mesh.dcn_data=N has to be among FLAGS
#   --service-account=NAME   Kubernetes service account that may write to the bucket (default)
#   --namespace=NAME         of Kubernetes
#   --spot                   on Spot machines
#   --restarts=N             how often a run that failed begins again; preemptions do not count (10)
#   --dry-run                print the command, with the manifest, instead of running it
#
# Preempted, the run starts anew and goes on from its newest checkpoint. Exit status: kubectl's, or 2 for wrong usage.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name='' image='' bucket='' accelerator=tpu-v5-lite-podslice topology=4x4 chips=4 slices=1 service_account=default spot=''
restarts=10 namespace=()
while (($#)); do
  case $1 in
    --help) show_help && exit ;;
    --dry-run) dry_run=yes ;;
    --spot) spot=yes ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --service-account=*) service_account=${1#*=} ;;
    --namespace=*) namespace=("--namespace=${1#*=}") ;;
    --restarts=*) restarts=${1#*=} ;;
    --) shift && break ;;
    *) usage_error "unknown option '$1' (see --help); flags of eqm_jax.main come after --" ;;
  esac
  shift
done

[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || usage_error "--name: up to 40 letters, digits, hyphens, not '$name'"
[[ $image =~ ^[A-Za-z0-9][-A-Za-z0-9_./:@]*$ ]] || usage_error "--image is the name of an image, not '$image'"
[[ $bucket =~ ^[a-z0-9][-a-z0-9_.]*$ ]] || usage_error "--bucket is a name without gs://, not '$bucket'"
[[ $accelerator =~ ^[-a-z0-9]+$ ]] || usage_error "--accelerator is GKE's name of a TPU, not '$accelerator'"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || usage_error "--topology is AxB or AxBxC, not '$topology'"
[[ $chips =~ ^[1-9][0-9]*$ ]] || usage_error "--chips is a number, not '$chips'"
[[ $slices =~ ^[1-9][0-9]*$ ]] || usage_error "--slices is a number, not '$slices'"
[[ $service_account =~ ^[-a-z0-9.]+$ ]] || usage_error "--service-account is a name, not '$service_account'"
[[ $restarts =~ ^[0-9]+$ ]] || usage_error "--restarts is a number, not '$restarts'"
((${topology//x/*} % chips == 0)) || usage_error "--topology=$topology: its chips do not divide by --chips=$chips"
for needed in --config --workdir; do
  [[ " $*" == *" $needed="* ]] || usage_error "$needed=... of eqm_jax.main is missing after --"
done

dcn_data=1
for argument; do
  if [[ $argument == --config.mesh.dcn_data=* ]]; then dcn_data=${argument#*=}; fi
done
[[ $dcn_data == "$slices" ]] ||
  usage_error "--slices=$slices needs --config.mesh.dcn_data=$slices of eqm_jax.main after --, not $dcn_data"

# Prints words as a list in JSON, of which YAML is a superset. Kubernetes reads $$ as $, and $(NAME) as a variable.
json() {
  local word line=''
  for word; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    word=${word//\$/\$\$}
    line+="${line:+, }\"$word\""
  done
  printf '%s' "$line"
}

manifest=$(<"$launch/jobset.yaml")
if [[ -z $spot ]]; then
  manifest=$(grep --invert-match 'only with --spot' <<<"$manifest")
fi
put() { # NAME VALUE
  manifest=${manifest//"\$$1"/"$2"}
}
put NAME "$name"
put RESTARTS "$restarts"
put SLICES "$slices"
put HOSTS "$((${topology//x/*} / chips))"
put SERVICE_ACCOUNT "$service_account"
put ACCELERATOR "$accelerator"
put TOPOLOGY "$topology"
put IMAGE "$image"
put CHIPS "$chips"
put BUCKET "$bucket"
put FLAGS "$(json "$@")" # the last: whatever is in them stays as it is

command=(kubectl apply "${namespace[@]}" --filename=-)
if [[ $dry_run ]]; then
  printf "%s <<'END_OF_MANIFEST'\n%s\nEND_OF_MANIFEST\n" "$(quoted "${command[@]}")" "$manifest"
  exit
fi
"${command[@]}" <<<"$manifest"
first_pod="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0"
first_pod+=",batch.kubernetes.io/job-completion-index=0"
echo "its state:  $(quoted kubectl get jobset "$name" "${namespace[@]}")"
echo "its log:    $(quoted kubectl logs --follow --container=eqm-jax "--selector=$first_pod" "${namespace[@]}")"
echo "to end it:  $(quoted kubectl delete jobset "$name" "${namespace[@]}")"
