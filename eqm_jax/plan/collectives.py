"""What a compiled program sends between chips: kinds, bytes, mesh axes, and whether arithmetic goes on meanwhile.

Bytes are those that leave one chip, by the formulas of a ring over N chips: an array of S bytes, whole, costs
S·(N−1)/N to gather or to reduce and scatter, twice that to reduce everywhere, S·(N−1)/N to exchange all to all, and S
to pass on. No algorithm sends less, on a torus of more dimensions either; latency comes on top.

A TPU's program holds collectives in five forms:
- `all-reduce(...)` alone: synchronous, nothing else runs meanwhile;
- `collective-permute-start` and `-done`, and other such pairs: asynchronous;
- a fusion around `AsyncCollectiveStart`, and fusions of later arithmetic that each carry the transfer a part on:
  asynchronous, counted once where it starts;
- a fusion `all-reduce-scatter`: a reduction of which each chip keeps its part, synchronous;
- a loop `windowed_dot_general` around a matrix product: a gather or reduction in parts, passed on from neighbour to
  neighbour while the part that is there is multiplied. It is told as the collective-permutes that it is.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from eqm_jax.plan import hlo, loops

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
WINDOWED = "windowed_dot_general"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program, over all the times that it is executed."""

  kind: str  # one of KINDS
  arrays: tuple[hlo.Array, ...]  # whole: of an all-gather what is gathered, otherwise what each chip puts in
  axes: tuple[str, ...] | None  # of the mesh, along which its chips lie; None: they form no part of the mesh
  chips: int  # N
  times: float
  asynchronous: bool
  windowed: bool  # part of a matrix product in parts
  op: str  # what it was in the model's code, as the compiler remembers it

  @property
  def bytes(self) -> float:
    """That leave one chip in the whole program."""
    return self.times * sum(map(self.bytes_of, self.arrays))

  def bytes_of(self, array: hlo.Array) -> float:
    """That leave one chip for one of the arrays, once."""
    share = (self.chips - 1) / self.chips
    return array.bytes * {"all-reduce": 2 * share, "collective-permute": min(1, self.chips - 1)}.get(self.kind, share)


def find(module: hlo.Module, mesh: Mapping[str, int], unknown_trips: Sequence[int] = ()) -> list[Collective]:
  """All collectives that a program executes.

  Args:
    module: the program.
    mesh: the sizes of the mesh's axes, in the order in which its devices are numbered.
    unknown_trips: as of `loops.executed`.
  """
  found = []
  for computation, times in loops.executed(module, unknown_trips):
    for instruction in computation.instructions:
      for inner, core, asynchronous in _cores(module, computation, instruction):
        collective = _collective(module, inner, core, mesh)
        windowed = WINDOWED in computation.name
        found.append(dataclasses.replace(collective, times=times, asynchronous=asynchronous, windowed=windowed))
  return [collective for collective in found if collective.chips > 1 and times]


def by_kind(collectives: Sequence[Collective]) -> dict[str, dict[str, float]]:
  """{kind: {"count", "bytes", "synchronous_bytes"}}, of those that there are."""
  table = {}
  for kind in KINDS:
    own = [collective for collective in collectives if collective.kind == kind]
    if own:
      table[kind] = {
        "count": sum(collective.times for collective in own),
        "bytes": sum(collective.bytes for collective in own),
        "synchronous_bytes": sum(collective.bytes for collective in own if not collective.asynchronous),
      }
  return table


def _cores(
  module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction
) -> Iterator[tuple[hlo.Computation, hlo.Instruction, bool]]:
  """The collectives that an instruction is or begins: (where it stands, the collective, whether asynchronous)."""
  opcode = instruction.opcode.removesuffix("-start")
  if opcode in KINDS:
    yield computation, instruction, opcode != instruction.opcode
  elif instruction.opcode == "async-start":
    for name in instruction.called:
      for core in module.computations[name].instructions:
        if core.opcode in KINDS:
          yield module.computations[name], core, True
  elif instruction.opcode == "fusion":
    inside = list(_inside(module, instruction))
    starts = any('"AsyncCollectiveStart"' in other.text for _, other in inside)
    for inner, core in inside:
      carried = "async_collective_fusion_config" in core.text
      if core.opcode in KINDS and (starts or not carried):
        yield inner, core, starts


def _inside(module: hlo.Module, fusion: hlo.Instruction) -> Iterator[tuple[hlo.Computation, hlo.Instruction]]:
  for name in fusion.called:
    for instruction in module.computations[name].instructions:
      yield module.computations[name], instruction
      if instruction.opcode == "fusion":
        yield from _inside(module, instruction)


def _collective(
  module: hlo.Module, computation: hlo.Computation, core: hlo.Instruction, mesh: Mapping[str, int]
) -> Collective:
  kind = core.opcode.removesuffix("-start")
  given = [array for operand in computation.operands(core) for array in operand.result]
  pairs = core.attribute(r"source_target_pairs=\{(.*?)\}\}")
  groups = _moves(pairs, mesh) if pairs else _groups(core.text, math.prod(mesh.values()))
  axes = None if groups is None else _axes(groups, mesh)
  if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
    kind = "reduce-scatter"
  chips = math.prod(mesh.values()) if groups is None else len(groups[0])
  if pairs and axes:  # a ring along axes, though each chip only knows its neighbour
    chips = math.prod(mesh[axis] for axis in axes)
  if kind == "all-gather":
    along = int(core.attribute(r"[ ,]dimensions=\{(\d+)\}"))
    given = [dataclasses.replace(array, dims=_grown(array.dims, along, chips)) for array in given]
  op = core.attribute(r'op_name="([^"]*)"') or ""
  return Collective(kind, tuple(given), axes, chips, 1, False, False, op)


def _groups(text: str, devices: int) -> np.ndarray | None:
  """[groups, N] numbers of devices, from the ways in which they are written."""
  if explicit := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
    rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", explicit[1])]
    return np.asarray(rows) if len({len(row) for row in rows}) == 1 else None
  if "replica_groups={}" in text:
    return np.arange(devices)[None]
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
    return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))
  named = re.search(r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\](?:, device_ids=\((.*?)\))? \{((?:'\w+',?)+)\}", text)
  if named is None:
    return None
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
  along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[3])]
  others = [i for i in range(len(sizes)) if i not in along]
  numbers = _iota(f"[{math.prod(sizes.values())}]" if named[2] is None else named[2])
  if numbers is None:
    return None
  numbers = numbers.reshape(*sizes.values()).transpose(*others, *along)
  return numbers.reshape(-1, math.prod(numbers.shape[len(others) :]))


def _grown(dims: tuple[int, ...], axis: int, times: int) -> tuple[int, ...]:
  return (*dims[:axis], dims[axis] * times, *dims[axis + 1 :])


def _iota(text: str) -> np.ndarray | None:
  """Numbers from 0 in the order that "[4,2]T(1,0)" says: so many along each axis, transposed; None: it is no order."""
  found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  if found is None:
    return None
  dims = [int(n) for n in found[1].split(",")]
  order = [int(n) for n in found[2].split(",")] if found[2] else range(len(dims))
  return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1)


def _moves(pairs: str, mesh: Mapping[str, int]) -> np.ndarray | None:
  """[moves, 2] from where to where, those that stay left out."""
  numbers = np.asarray([int(n) for n in re.findall(r"\d+", pairs)]).reshape(-1, 2)
  moves = numbers[numbers[:, 0] != numbers[:, 1]]
  return moves if len(moves) else np.zeros((1, 1), int)


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...] | None:
  """The axes of the mesh along which the devices of a group lie."""
  if groups.max() >= math.prod(mesh.values()):
    return None
  places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, N]
  varies = np.any(places != places[..., :1], axis=(1, 2))
  return tuple(itertools.compress(mesh, varies))
