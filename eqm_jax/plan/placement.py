"""What lies whole on every device, and what XLA moves between devices that the sharding rules do not ask for.

The rules explain this much: arrays of parameters are gathered, scattered and passed on along the axes that split them,
their gradients are reduced along the axes that split the batch, and what a layer split along `tensor` computes is
reduced along that. Anything else is resharding that the compiler put in, told with the operation that it belongs to.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from eqm_jax.plan.collectives import Collective
from eqm_jax.training import sharding

LARGE = 16 * 2**20  # bytes of one array: smaller ones may lie whole on every device
SHARE = 0.25  # of the memory: as much of a state may lie whole on every device without a word
FLOOR = 2**20  # bytes on the links in one execution: less is told only in sum
FILLED = 1.15  # times as long may an axis be that XLA fills up
REDUCTIONS = ("all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Resharding:
  """Collectives of one kind and place that no rule asks for."""

  kind: str
  axes: tuple[str, ...]
  shape: str  # "bf16[16,256,1152]", the array on each device
  op: str
  bytes: float  # that leave one chip in one execution


class Parameters:
  """The shapes in which arrays of parameters appear in a program: whole or split, all blocks' or one's, axes merged."""

  def __init__(self, shapes: Any, shardings: Any, mesh: Mesh):
    self._axes: dict[tuple[int, ...], set[str]] = {}
    for (path, leaf), placed in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings)):
      spec = [*placed.spec, *(None,) * (len(leaf.shape) - len(placed.spec))]
      ways = [() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec]
      split = {axis for axes in ways for axis in axes if mesh.shape[axis] > 1}
      first = sharding.path_name(path).startswith("blocks/")  # 1: the leading axis is the blocks'
      ways = [math.prod(mesh.shape[axis] for axis in axes) for axes in ways]
      for shape in _variants(leaf.shape[first:], ways[first:]):
        self._axes.setdefault(shape, set()).update(split)
        if first:
          self._axes.setdefault(_sorted((leaf.shape[0], *shape)), set()).update(split)

  def axes(self, dims: tuple[int, ...]) -> set[str] | None:
    """The axes that split the parameters that an array of these dimensions may be of; None: it is of none."""
    shape = _sorted(dims)
    if shape in self._axes:
      return self._axes[shape]
    # XLA fills up an axis that does not come in whole tiles on every device.
    for known, axes in self._axes.items():
      differing = [(size, more) for size, more in zip(known, shape) if size != more]
      if (
        len(known) == len(shape)
        and len(differing) == 1
        and differing[0][0] < differing[0][1] <= FILLED * differing[0][0]
      ):
        return axes
    return None


def reshardings(
  collectives: Sequence[Collective], parameters: Parameters, mesh: Mapping[str, int]
) -> tuple[list[Resharding], float]:
  """What no rule explains, the largest first, and the bytes of all that are below `FLOOR`."""
  found: dict[tuple, float] = {}
  for collective in collectives:
    axes = ("?",) if collective.axes is None else collective.axes
    for array in collective.arrays:
      if not _explained(collective, array.dims, parameters):
        shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
        key = collective.kind, axes, shape, collective.op
        found[key] = found.get(key, 0) + collective.times * collective.bytes_of(array)
  told = [Resharding(*key, size) for key, size in found.items() if size >= FLOOR]
  rest = sum(size for size in found.values() if size < FLOOR)
  return sorted(told, key=lambda one: -one.bytes), rest


def replicated(state: Any, shardings: Any, mesh: Mesh, memory: float) -> list[str]:
  """Sentences about large arrays that lie whole on every device.

  Args:
    state: the TrainState's shapes.
    shardings: of its leaves.
    mesh: of the run.
    memory: bytes that a device may use.
  """
  if mesh.size == 1:
    return []
  whole = [
    (sharding.path_name(path), leaf.size * leaf.dtype.itemsize)
    for (path, leaf), placed in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings))
    if placed.is_fully_replicated
  ]
  large = [(name, size) for name, size in whole if size >= LARGE]
  if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:  # they were to be split
    return [f"{name} ({size / 2**20:.0f} MiB) lies whole on every device: no rule splits it" for name, size in large]
  total = sum(size for _, size in whole)
  if total < SHARE * memory:
    return []
  return [
    f"the whole state ({total / 2**30:.1f} GiB, {100 * total / memory:.0f} % of a chip's memory) lies on every device: "
    "config.mesh.fsdp above 1 splits it"
  ]


def misplaced(compiled: jax.stages.Compiled, given: Any, asked: Any) -> list[str]:
  """Sentences about arguments that a compiled program wants elsewhere, and results that it leaves elsewhere.

  Args:
    compiled: the program.
    given, asked: its arguments and the first of its results, as ShapeDtypeStructs with shardings.
  """
  found = []
  sides = ("argument", given, compiled.input_shardings[0]), ("result", asked, compiled.output_shardings)
  for kind, tree, placed in sides:
    there = jax.tree.leaves(placed, is_leaf=lambda leaf: leaf is None)  # None: an argument that nothing uses
    for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(tree), there):
      if where is not None and not where.is_equivalent_to(leaf.sharding, len(leaf.shape)):
        name = sharding.path_name(path)
        found.append(f"{kind} {name} lies as {where} in the compiled program, not as {leaf.sharding.spec}")
  return found


def divisions(options: ml_collections.ConfigDict, shapes: Any, devices: Sequence[jax.Device]) -> Iterator[Mesh]:
  """The meshes of data × fsdp with the config's `tensor` that its rules accept for a state, the smallest fsdp first."""
  tensor = options.mesh.tensor
  for fsdp in range(1, len(devices) // tensor + 1):
    if (len(devices) // tensor) % fsdp == 0:
      mesh = sharding.make_mesh(-1, fsdp, tensor, devices=devices)
      try:
        sharding.state_shardings(shapes, options.sharding, mesh)
        sharding.batch_sharding(mesh, options.train.batch_size, options.train.accumulate)
      except ValueError:
        continue
      yield mesh


def _explained(collective: Collective, dims: tuple[int, ...], parameters: Parameters) -> bool:
  if collective.axes is None:
    return False
  along = set(collective.axes)
  split = parameters.axes(dims)
  if split is not None:
    return along <= (split | set(sharding.BATCH) if collective.kind in REDUCTIONS else split)
  return along == {"tensor"} and (collective.kind in REDUCTIONS or collective.windowed)


def _variants(dims: tuple[int, ...], ways: Sequence[int]) -> set[tuple[int, ...]]:
  """The dimensions of an array, sorted: each split in so many ways or not, and neighbours merged or not."""
  found = set()
  for kept in itertools.product(*({size, size // way} for size, way in zip(dims, ways))):
    for cuts in itertools.product((False, True), repeat=max(0, len(dims) - 1)):
      merged = list(kept[:1])
      for cut, size in zip(cuts, kept[1:]):
        merged = [*merged, size] if cut else [*merged[:-1], merged[-1] * size]
      found.add(_sorted(tuple(merged)))
  return found


def _sorted(dims: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(sorted(size for size in dims if size > 1))
