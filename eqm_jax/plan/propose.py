"""The cheapest settings that fit: rematerialisation, mesh and accumulation for training, batch sizes for the rest."""

import dataclasses
import logging

import ml_collections

from eqm_jax.networks.dit import REMAT_POLICIES, DiT
from eqm_jax.plan import placement, programs
from eqm_jax.plan.compiled import RESERVE, Figures, compile_program
from eqm_jax.plan.topology import Topology
from eqm_jax.training import sharding

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """Settings that fit, those compiled on the way to them, and why there are none, if so."""

  flags: str  # what to add to the command; "": the given settings are the best, or none fits
  figures: Figures | None  # of the settings proposed; None: none fits
  tried: tuple[tuple[str, Figures], ...]  # (flags, figures)
  reason: str


def training(config: ml_collections.ConfigDict, topology: Topology, given: Figures) -> Proposal:
  """The training step with the smallest bound of those that fit.

  Every rematerialisation is compiled on the config's mesh, or on the one that splits the state most where it does not
  fit there; then the fastest on the mesh of the smallest `fsdp` that should do: from one mesh to another memory changes
  by the state's share alone, since a chip's images stay as many. Where nothing fits, the batch is accumulated in parts.

  Args:
    config: the whole config, as given.
    topology: the slice.
    given: the training step as the config has it.
  """
  shapes = programs.state_shapes(config, DiT(**config.model))
  held = {
    mesh.shape["fsdp"]: sharding.held(shapes, sharding.state_shardings(shapes, config.sharding, mesh))
    for mesh in placement.divisions(config, shapes, topology.devices)
  }
  memory = (1 - RESERVE) * topology.chip.usable_memory
  fitting = [fsdp for fsdp in held if held[fsdp] < memory]
  if not fitting:
    least = min(held.values(), default=0) / 2**30
    reason = f"the state alone takes {least:.2f} GiB of each chip on the mesh that splits it most: take more chips"
    return Proposal("", None, (), reason)

  tried: dict[tuple[str, int, int], Figures] = {}
  own = config.model.remat, given.program.mesh["fsdp"], config.train.accumulate
  tried[own] = given

  def try_out(remat: str, fsdp: int, parts: int) -> Figures:
    key = remat, fsdp, parts
    if key not in tried:
      tried[key] = compile_program(programs.training(_changed(config, *key), topology), topology)
    return tried[key]

  start = own[1] if own[1] in fitting else fitting[-1]
  for remat in REMAT_POLICIES:
    found = try_out(remat, start, own[2])
    if not found.fits and found.needed - held[start] + held[fitting[-1]] <= memory:
      try_out(remat, fitting[-1], own[2])
  if best := _fastest(tried):
    rest = tried[best].needed - held[best[1]]
    smallest = next(fsdp for fsdp in fitting if rest + held[fsdp] <= memory)
    try_out(best[0], smallest, best[2])
    return _proposed(own, _fastest(tried), tried, "the smallest bound of those that fit")
  parts = 2 * own[2]
  while given.program.images % parts == 0:
    if try_out("full", fitting[-1], parts).fits:
      key = "full", fitting[-1], parts
      return _proposed(own, key, tried, "nothing fits without accumulating the batch in parts")
    parts *= 2
  return _proposed(own, None, tried, "not even one image on a chip fits: take more chips")


def batch(config: ml_collections.ConfigDict, topology: Topology, given: Figures) -> Proposal:
  """Sampling or decoding with half as many images at a time, and half of that, until it fits."""
  section = "evaluation" if given.program.kind == programs.SAMPLING else "autoencoder"
  make = programs.sampling if given.program.kind == programs.SAMPLING else programs.decoding
  tried, size = [], given.program.images // 2
  while size:
    changed = config.copy_and_resolve_references()
    changed[section].batch_size = size
    flags = f"--config.{section}.batch_size={size}"
    tried.append((flags, compile_program(make(changed, topology), topology)))
    if tried[-1][1].fits:
      return Proposal(flags, tried[-1][1], tuple(tried), "the largest half, quarter, … of the batch that fits")
    size //= 2
  return Proposal("", None, tuple(tried), "not even one image at a time fits")


def _fastest(tried: dict[tuple[str, int, int], Figures]) -> tuple[str, int, int] | None:
  fitting = {key: found.bound.seconds for key, found in tried.items() if found.fits}
  return min(fitting, key=fitting.get) if fitting else None


def _proposed(own, key, tried, reason: str) -> Proposal:
  told = tuple((_flags(one), found) for one, found in tried.items())
  if key is None:
    return Proposal("", None, told, reason)
  return Proposal("" if key == own else _flags(key), tried[key], told, reason)


def _flags(key: tuple[str, int, int]) -> str:
  remat, fsdp, parts = key
  return (
    f"--config.model.remat={remat} --config.mesh.data=-1 --config.mesh.fsdp={fsdp} --config.train.accumulate={parts}"
  )


def _changed(config: ml_collections.ConfigDict, remat: str, fsdp: int, parts: int) -> ml_collections.ConfigDict:
  changed = config.copy_and_resolve_references()
  changed.model.remat, changed.train.accumulate = remat, parts
  changed.mesh.update(data=-1, fsdp=fsdp)
  return changed
