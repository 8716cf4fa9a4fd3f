#!/usr/bin/env bash
# Runs eqm_jax.main on N pretended devices of this machine's CPU, to try meshes without accelerators.
# Usage: launch/local.sh N --config=configs/digits.py --workdir=runs/digits8 [--config.mesh.fsdp=2 ...]
set -euo pipefail
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N --config=FILE --workdir=DIR [more flags of eqm_jax.main]; N is a number of devices, not '${1:-}'" >&2
  exit 2
fi
devices=$1
shift
export JAX_PLATFORMS=cpu
export XLA_FLAGS="--xla_force_host_platform_device_count=$devices ${XLA_FLAGS:-}"
exec python -m eqm_jax.main "$@"
