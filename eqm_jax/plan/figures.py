"""The figures of a program: compiled for a slice, or found not to fit, with warnings about where its arrays lie.

The sharding rules explain gathers, scatters and permutations of parameters along the axes that split them, reductions
of gradients along the axes that split the batch, and reductions along `tensor`. Any other collective is resharding.
"""

import dataclasses
import itertools
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from eqm_jax.equilibrium import streaming
from eqm_jax.hardware import Chip
from eqm_jax.networks.dit import MODULATIONS
from eqm_jax.plan import costs, hlo
from eqm_jax.plan.programs import SAMPLING, Program
from eqm_jax.plan.topology import Topology
from eqm_jax.training import sharding
from eqm_jax.trees import path_name

# Share of the usable memory that is kept for batches read ahead, samples that wait to be fetched, gaps between arrays.
RESERVE = 0.05
LARGE = 16 * 2**20  # bytes of one array: smaller ones may lie whole on every device
SHARE = 0.25  # of the memory: a state below it may lie whole on every device without a warning
FLOOR = 2**20  # bytes on the links in one execution: resharding below it is reported in sum
MOVERS = 15  # instructions that are listed of those that move most bytes in HBM
PADDING = 1.15  # up to this factor XLA pads an axis that the devices do not divide
REDUCTIONS = ("all-reduce", "reduce-scatter")
RECOMPUTED = re.compile(r"\.remat\d*(\.\d+)*$")  # names of instructions that XLA itself decided to compute again

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Figures:
  """The figures of a compiled program. Numbers are those of one chip; times and bytes of one iteration."""

  program: Program
  chip: Chip
  seconds: float  # of compilation
  memory: dict[str, int]  # bytes: arguments, outputs, aliased (outputs in the place of arguments), temporaries, needed
  refused: str = ""  # XLA's message about a program that is too large to be compiled; "": it was compiled
  flops: float = 0.0
  hbm_bytes: float = 0.0
  collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  cycles: float = 0.0  # XLA's own estimate
  movers: tuple[costs.Mover, ...] = ()  # the instructions that move most of `hbm_bytes`
  bound: costs.Roofline | None = None  # None: refused
  critical_batch: float = 0.0
  warnings: tuple[str, ...] = ()

  @property
  def needed(self) -> int:
    return self.memory["needed"]

  @property
  def fits(self) -> bool:
    return not self.refused and self.needed <= (1 - RESERVE) * self.chip.usable_memory

  @property
  def seconds_at_mfu(self) -> float:
    """Time of one iteration at `costs.MFU` of the chip's peak."""
    return self.flops / (costs.MFU * self.chip.flops)

  @property
  def images_per_second(self) -> float:
    """Rate of one chip at the bound, by this program alone."""
    return self.program.images / self.program.mesh.get("tensor", 1) / (self.program.nfe * self.bound.seconds)

  def numbers(self) -> dict[str, Any]:
    """The figures as JSON: bytes, seconds and operations."""
    program, chip = self.program, self.chip
    row = {"program": program.kind, "images_per_chip": program.images, "nfe_per_image": program.nfe}
    row |= {name: getattr(program, name) for name in ("about", "mesh", "argument_bytes")}
    row |= {"compile_seconds": round(self.seconds, 1), "fits": self.fits, "refused": self.refused}
    row |= {"memory": {**self.memory, "usable": chip.usable_memory, "stated": chip.memory}}
    row |= {"warnings": list(self.warnings)}
    if self.bound is None:
      return row
    sent = [(one["bytes"], one["synchronous_bytes"]) for one in self.collectives.values()]
    row |= {name: getattr(self, name) for name in ("flops", "hbm_bytes", "seconds_at_mfu", "collectives")}
    row |= {"flops_done_again": program.rematerialised_flops}
    row |= {"estimated_cycles": self.cycles}
    row |= {"movers": [dataclasses.asdict(one) for one in self.movers]}
    row |= {"mfu": costs.MFU, "flops_per_second_at_mfu": costs.MFU * chip.flops}
    row["link_bytes"] = {
      "asynchronous": sum(total - synchronous for total, synchronous in sent) / program.iterations,
      "synchronous": sum(synchronous for _, synchronous in sent) / program.iterations,
    }
    row |= {"bound_seconds": self.bound.seconds, "limit": self.bound.limit}
    names = ("arithmetic", "hbm", "links_asynchronous", "links_synchronous")
    row["bound_parts"] = dict(zip(names, dataclasses.astuple(self.bound)))
    if self.bound.dcn:
      row["bound_parts"]["dcn"] = self.bound.dcn
    row |= {"images_per_second_per_chip": self.images_per_second, "critical_batch_per_chip": self.critical_batch}
    return row


def compile_program(program: Program, topology: Topology) -> Figures:
  """Compiles a program and reads its figures."""
  chip, begin = topology.chip, time.monotonic()
  log.info("%s, %s: compiling for %s …", program.kind, program.about, topology.name)
  try:
    compiled = program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
      raise
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    needed = int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]]) if match else 0
    refused = next(line for line in message.splitlines() if "RESOURCE_EXHAUSTED" in line)
    warnings = tuple(replicated(program.state, program.mesh, chip.usable_memory))
    figures = Figures(program, chip, time.monotonic() - begin, {"needed": needed}, refused, warnings=warnings)
  else:
    figures = _read(program, chip, time.monotonic() - begin, compiled)
  fits = "" if figures.fits else "does not fit: "
  log.info("  %.0f s; %s%.2f of %.2f GiB", figures.seconds, fits, figures.needed / 2**30, chip.usable_memory / 2**30)
  return figures


def _read(program: Program, chip: Chip, seconds: float, compiled: jax.stages.Compiled) -> Figures:
  sizes = compiled.memory_analysis()
  fields = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
  fields["code"] = "generated_code"
  memory = {name: getattr(sizes, f"{field}_size_in_bytes") for name, field in fields.items()}
  memory["needed"] = sum(memory.values()) - 2 * memory["aliased"]
  module = hlo.parse(compiled.as_text())
  # The sampling loops end by the data: all iterations count in the first, with all slots, none in those with fewer.
  trips = [program.iterations] + [0] * streaming.HALVINGS if program.kind == SAMPLING else []
  collectives = costs.find_collectives(module, program.mesh, trips)
  asynchronous, synchronous = (
    sum(one.bytes for one in collectives if one.asynchronous == kind) / program.iterations for kind in (True, False)
  )
  movers = [
    dataclasses.replace(one, bytes=one.bytes / program.iterations, times=one.times / program.iterations)
    for one in costs.find_movers(module, trips)
  ]
  hbm_bytes = sum(one.bytes for one in movers)
  # Without a formula the compiler's count, which is right for programs without loops.
  flops = compiled.cost_analysis()["flops"] if program.flops is None else program.flops
  names = [instruction.name for part in module.computations.values() for instruction in part.instructions]
  recomputed = sum(bool(RECOMPUTED.search(name)) for name in names)
  dcn_bytes = sum(one.dcn_bytes for one in collectives) / program.iterations
  links = asynchronous + synchronous
  critical = costs.critical_batch(chip, flops / program.images, program.fixed_hbm, links, fixed_dcn_bytes=dcn_bytes)
  warnings = replicated(program.state, program.mesh, chip.usable_memory)
  if program.state is not None:
    warnings += resharding(collectives, ParameterShapes(program.state.params, program.mesh))
  warnings += small_batch(program, critical)
  if recomputed:
    warnings.append(f"XLA itself computes {recomputed} operations again to save memory: it is nearly full")
  numbers = {"flops": flops, "hbm_bytes": hbm_bytes, "movers": tuple(movers[:MOVERS]), "critical_batch": critical}
  numbers["cycles"] = costs.estimated_cycles(module, trips) / program.iterations
  figures = Figures(program, chip, seconds, memory, **numbers)
  traffic = hbm_bytes, asynchronous, synchronous
  bound = costs.roofline(chip, flops + program.rematerialised_flops, *traffic, dcn_bytes=dcn_bytes)
  return dataclasses.replace(figures, collectives=costs.by_kind(collectives), bound=bound, warnings=tuple(warnings))


class ParameterShapes:
  """The shapes of parameters in a program: whole or split, all blocks' or one's, axes merged."""

  def __init__(self, params: Any, mesh: Mapping[str, int]):
    self._slices = sharding.SLICES in mesh
    self._axes: dict[tuple[int, ...], set[str]] = {}  # sorted dimensions → the axes that split them
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      spec = [*leaf.sharding.spec, *(None,) * (len(leaf.shape) - len(leaf.sharding.spec))]
      names = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
      split = {axis for axes in names for axis in axes if mesh[axis] > 1}
      shards = [math.prod(mesh[axis] for axis in axes) for axes in names]
      first = path_name(path).startswith("blocks/")  # 1: the leading axis is the blocks'
      for shape in _variants(leaf.shape[first:], shards[first:]):
        self._axes.setdefault(shape, set()).update(split)
        if first:
          self._axes.setdefault(_sorted((leaf.shape[0], *shape)), set()).update(split)

  def axes(self, dims: tuple[int, ...]) -> set[str] | None:
    """The axes that split the parameters of these dimensions; None: no parameter has them."""
    shape = _sorted(dims)
    if shape in self._axes:
      return self._axes[shape]
    for known, axes in self._axes.items():
      differing = [(size, padded) for size, padded in zip(known, shape) if size != padded]
      if len(known) == len(shape) and len(differing) == 1 and 1 < differing[0][1] / differing[0][0] <= PADDING:
        return axes
    return None

  def explains(self, collective: costs.Collective, dims: tuple[int, ...]) -> bool:
    """Whether the sharding rules ask for a collective of an array of these dimensions."""
    if MODULATIONS in collective.op and collective.kind not in REDUCTIONS:  # split by outputs, then by samples
      return True
    along, split = set(collective.axes or ()), self.axes(dims)
    reduction = collective.kind in REDUCTIONS
    # libtpu makes sums over slices of collectives that it names after no operation, of arrays in shapes of its own.
    if self._slices and along <= set(sharding.BATCH) and not collective.op:
      return True
    if along == {sharding.SLICES} and reduction:
      return True
    if collective.axes is None or split is None:
      return along == {"tensor"} and (reduction or collective.windowed)
    return along <= (split | set(sharding.BATCH) if reduction else split)


def resharding(collectives: Sequence[costs.Collective], parameters: ParameterShapes) -> list[str]:
  """Warnings about arrays that move although no sharding rule asks for it, the largest first."""
  total, unexplained = sum(one.bytes for one in collectives), {}
  for one in collectives:
    for array in one.arrays:
      if not parameters.explains(one, array.dims):
        shape, axes = f"{array.dtype}[{','.join(map(str, array.dims))}]", " and ".join(one.axes or "?")
        key = f"{one.kind} of {shape} over {axes}", one.op
        unexplained[key] = unexplained.get(key, 0) + one.times * one.bytes_of(array)
  rest = sum(size for size in unexplained.values() if size < FLOOR)
  warnings = [
    f"{moved}, {size / 2**20:.1f} MiB a step ({100 * size / total:.1f} % of all), which no sharding rule asks for: "
    f"{op or 'of no named operation'}"
    for (moved, op), size in sorted(unexplained.items(), key=lambda item: -item[1])
    if size >= FLOOR
  ]
  if rest > 0.01 * total:
    warnings.append(f"smaller arrays that no sharding rule asks to move: {rest / 2**20:.1f} MiB a step together")
  return warnings


def replicated(state: Any, mesh: Mapping[str, int], memory: float) -> list[str]:
  """Warnings about large arrays of a state (shapes with shardings) that lie whole on every device of `memory` bytes."""
  if state is None or math.prod(mesh.values()) == 1:
    return []
  whole = [
    (path_name(path), leaf.size * leaf.dtype.itemsize)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if leaf.sharding.is_fully_replicated
  ]
  if mesh["fsdp"] * mesh["tensor"] > 1:  # they were to be split
    large = [(name, size) for name, size in whole if size >= LARGE]
    return [f"{name} ({size / 2**20:.0f} MiB) lies whole on every device: no rule splits it" for name, size in large]
  total = sum(size for _, size in whole)
  if total < SHARE * memory:
    return []
  return [
    f"the whole state ({total / 2**30:.1f} GiB, {100 * total / memory:.0f} % of a chip's memory) lies on every device: "
    "config.mesh.fsdp above 1 splits it"
  ]


def small_batch(program: Program, critical: float) -> list[str]:
  """A warning about fewer images on a chip than the critical batch."""
  if program.images >= critical:
    return []
  return [
    f"{program.images} images on a chip are fewer than the {critical:.0f} whose arithmetic takes as long as moving "
    "weights, state and gradients: a larger batch, or fewer chips, would use them better"
  ]


def _variants(dims: tuple[int, ...], shards: Sequence[int]) -> set[tuple[int, ...]]:
  """Sorted dimensions of an array: each axis split or not, and neighbours merged or not."""
  variants = set()
  for kept in itertools.product(*({size, size // count} for size, count in zip(dims, shards))):
    for cuts in itertools.product((False, True), repeat=max(0, len(dims) - 1)):
      merged = list(kept[:1])
      for cut, size in zip(cuts, kept[1:]):
        merged = [*merged, size] if cut else [*merged[:-1], merged[-1] * size]
      variants.add(_sorted(tuple(merged)))
  return variants


def _sorted(dims: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(sorted(size for size in dims if size > 1))
