"""The costs of a compiled program on one chip: bytes on the links, bytes in HBM, and the time that they take at least.

Links. Bytes are those that leave one chip, by the formulas of a ring, which no algorithm beats. A TPU's program holds
collectives alone (synchronous), as pairs `-start` and `-done` (asynchronous), and in three further forms:
- a fusion around `AsyncCollectiveStart`, and fusions of later arithmetic that each continue the transfer:
  asynchronous, counted once where it starts;
- a fusion `all-reduce-scatter`: a reduction of which each chip keeps its shard, synchronous;
- a loop `windowed_dot_general` around a matrix product: a gather or reduction in pieces, passed from neighbour to
  neighbour while the piece at hand is multiplied. It is counted as the collective-permutes that it consists of.

Between slices. libtpu makes of a sum over several slices a reduce-scatter within each, a sum of each chip's part
between them, and a gather; the middle one is a pair of `send` and `recv` to its runtime (Megascale), beside other work.
Over D slices a part of S bytes sends 2·S·(D−1)/D out of a chip, over the network of the data center (DCN). A collective
that spans slices as one is counted as one within each slice and one between them.

HBM. Counted instruction by instruction: the arrays in HBM that it reads and writes, tiles and padding included, times
the turns of the loops around it; of a slice or an update in place, the slice. Collectives are left out: their reads and
writes move with the bytes on the links. An array that a fusion reads twice is counted once.

Roofline (Williams, Waterman & Patterson 2009):

    time ≥ max(FLOPs / peak, HBM bytes / bandwidth, asynchronous link bytes / link bandwidth, DCN bytes / bandwidth)
           + synchronous link bytes / link bandwidth

It is a bound and no prediction: every unit works at its stated rate all the time, and work that the program does not
order overlaps. Matrix products in float32 count at the bfloat16 rate: by default a TPU rounds their inputs to it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from eqm_jax.hardware import Chip
from eqm_jax.networks import flops as flops_lib
from eqm_jax.networks.dit import SLICES, DiT
from eqm_jax.plan import hlo

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
COMMUNICATION = (*KINDS, "async", "send", "recv")  # opcodes
FREE = (
  "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
  "opt-barrier add-dependency domain iota get-dimension-size"
).split()
SLICING = ("dynamic-slice", "slice", "gather")
IN_PLACE = {"dynamic-update-slice": 1, "scatter": -1}  # opcode: which operand has the new values
MFU = 0.4  # model FLOPs utilization that a well-tuned transformer of this size reaches on TPUs


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program, over all the times that it is executed."""

  kind: str  # one of KINDS
  arrays: tuple[hlo.Array, ...]  # of an all-gather the gathered ones, otherwise each chip's inputs
  axes: tuple[str, ...] | None  # of the mesh, along which its chips lie; None: they do not follow the mesh
  chips: int  # N
  times: float
  asynchronous: bool
  windowed: bool  # part of a matrix product in pieces
  op: str  # the operation in the model's code, as the compiler records it
  slices: int = 1  # among which the N chips lie

  @property
  def bytes(self) -> float:
    """Bytes that leave one chip over its links in the whole program."""
    return self.times * sum(map(self.bytes_of, self.arrays))

  @property
  def dcn_bytes(self) -> float:
    """Bytes that leave one chip to other slices in the whole program."""
    whole = self.kind == "collective-permute"
    part = 1 if whole else self.slices / self.chips
    return self.times * part * self._share(self.slices) * sum(array.bytes for array in self.arrays)

  def bytes_of(self, array: hlo.Array) -> float:
    """Bytes that leave one chip over its links for one of the arrays, once."""
    return array.bytes * self._share(self.chips // self.slices)

  def _share(self, number: int) -> float:
    """The part of an array that leaves one of a number of chips, or slices, that hold it together."""
    share = (number - 1) / number
    return {"all-reduce": 2 * share, "collective-permute": min(1, number - 1)}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Mover:
  """One instruction that moves bytes between HBM and the chip, over all the times that it is executed."""

  bytes: float
  times: float
  name: str  # the instruction's in the program; fusions are called after what they end with
  result: str  # types and shapes of what it makes
  op: str  # the operation in the model's code, as the compiler records it


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Lower bound of the seconds of one execution on one chip, by unit."""

  arithmetic: float
  memory: float  # HBM
  overlapped: float  # links, asynchronous collectives
  exposed: float  # links, synchronous collectives
  dcn: float = 0.0  # between slices

  @property
  def seconds(self) -> float:
    """The bound."""
    return max(self.arithmetic, self.memory, self.overlapped, self.dcn) + self.exposed

  @property
  def limit(self) -> str:
    """The unit that takes longest."""
    times = {"arithmetic": self.arithmetic, "HBM": self.memory, "links": self.overlapped + self.exposed}
    times["DCN"] = self.dcn
    return max(times, key=times.get)


def roofline(
  chip: Chip, flops: float, hbm_bytes: float, asynchronous: float, synchronous: float, *, dcn_bytes: float = 0.0
) -> Roofline:
  """The bound of one execution, from its FLOPs (rematerialised ones included) and its bytes by where they move."""
  links, dcn = chip.link_bandwidth, dcn_bytes / chip.dcn_bandwidth if dcn_bytes else 0.0
  times = flops / chip.flops, hbm_bytes / chip.memory_bandwidth, asynchronous / links, synchronous / links
  return Roofline(*times, dcn)


def critical_batch(
  chip: Chip, flops: float, fixed_hbm_bytes: float, fixed_link_bytes: float, *, fixed_dcn_bytes: float = 0.0
) -> float:
  """The images on a chip whose arithmetic (`flops` each) takes as long as the traffic that does not grow with them.

  With fewer the chip waits for weights, optimizer state and gradients; with more at most for activations.
  """
  bound = roofline(chip, 0.0, fixed_hbm_bytes, fixed_link_bytes, 0.0, dcn_bytes=fixed_dcn_bytes)
  return bound.seconds * chip.flops / flops


def rematerialised_flops(model: DiT, fused: bool = False) -> int:
  """FLOPs of one training step for one image that the backward pass adds to those of `flops.training`.

  "full" repeats the forward pass of every block, "dots_no_batch" the two products of attention, "dots" and "none" no
  product. The field of an energy is a derivative itself, so it has every block twice.

  Args:
    model: of the step.
    fused: its attention is the kernel's, whose backward pass always computes the logits again, and whose forward pass
      is never repeated.
  """
  attention = 4 * (model.input_size // model.patch_size) ** 4 * model.width
  block = flops_lib.forward(model.clone(depth=2, unroll=1)) - flops_lib.forward(model.clone(depth=1, unroll=1))
  block -= 12 * model.width**2  # its modulation is computed before the loop
  repeated = {"none": 0, "dots": 0, "dots_no_batch": attention, "full": block}[model.remat]
  if fused:
    repeated = (block - attention if model.remat == "full" else 0) + attention // 2
  return model.depth * repeated * (1 if model.energy == "none" else 2)


def find_collectives(
  module: hlo.Module, mesh: Mapping[str, int], unknown_trips: Sequence[int] = ()
) -> list[Collective]:
  """All collectives that a program executes on a mesh {axis: size}; `unknown_trips` as in `hlo.executed`."""
  collectives = []
  for computation, times in hlo.executed(module, unknown_trips):
    windowed = "windowed_dot_general" in computation.name
    for instruction in computation.instructions:
      for inner, core, asynchronous in _cores(module, computation, instruction):
        execution = {"times": times, "asynchronous": asynchronous, "windowed": windowed}
        collectives.append(_collective(inner, core, mesh, execution))
      if instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.text:
        collectives.append(_between_slices(computation, instruction, mesh.get(SLICES, 1), times))
  return [collective for collective in collectives if collective.chips > 1 and collective.times]


def by_kind(collectives: Sequence[Collective]) -> dict[str, dict[str, float]]:
  """{kind: {"count", "bytes", "synchronous_bytes"}} of the kinds that occur; with "dcn_bytes" between slices."""
  table = {}
  for kind in sorted({one.kind for one in collectives}, key=KINDS.index):
    own = [one for one in collectives if one.kind == kind]
    synchronous = sum(one.bytes for one in own if not one.asynchronous)
    count, total = sum(one.times for one in own), sum(one.bytes for one in own)
    table[kind] = {"count": count, "bytes": total, "synchronous_bytes": synchronous}
    if dcn_bytes := sum(one.dcn_bytes for one in own):
      table[kind]["dcn_bytes"] = dcn_bytes
  return table


def find_movers(module: hlo.Module, unknown_trips: Sequence[int] = ()) -> list[Mover]:
  """The instructions that read from or write to HBM, the one that moves most first.

  Their bytes together are those of one execution on one chip; `unknown_trips` as in `hlo.executed`.
  """
  movers = []
  for computation, times in hlo.executed(module, unknown_trips):
    for instruction in computation.instructions:
      moved = times * _moved(module, computation, instruction)
      if moved:
        result = ", ".join(f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in instruction.result)
        op = instruction.attribute(r'op_name="([^"]*)"') or ""
        movers.append(Mover(moved, times, instruction.name, result, op))
  return sorted(movers, key=lambda one: -one.bytes)


def estimated_cycles(module: hlo.Module, unknown_trips: Sequence[int] = ()) -> int:
  """XLA's own estimates of all instructions, added up; it has none for kernels and collectives."""
  total = 0
  for computation, times in hlo.executed(module, unknown_trips):
    estimates = (one.attribute(r'"estimated_cycles":"(\d+)"') for one in computation.instructions)
    total += times * sum(int(cycles) for cycles in estimates if cycles)
  return round(total)


def _cores(
  module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction
) -> Iterator[tuple[hlo.Computation, hlo.Instruction, bool]]:
  """The collectives that an instruction is or starts: (its computation, the collective, whether asynchronous)."""
  if instruction.opcode.removesuffix("-start") in KINDS:
    yield computation, instruction, instruction.opcode.endswith("-start") or computation.name.startswith("async")
  elif instruction.opcode == "fusion":
    inside = list(_inside(module, instruction))
    starts = any('"AsyncCollectiveStart"' in other.text for _, other in inside)
    for inner, core in inside:
      if core.opcode in KINDS and (starts or "async_collective_fusion_config" not in core.text):
        yield inner, core, starts


def _inside(module: hlo.Module, fusion: hlo.Instruction) -> Iterator[tuple[hlo.Computation, hlo.Instruction]]:
  for name in fusion.called:
    for instruction in module.computations[name].instructions:
      yield module.computations[name], instruction
      if instruction.opcode == "fusion":
        yield from _inside(module, instruction)


def _collective(
  computation: hlo.Computation, core: hlo.Instruction, mesh: Mapping[str, int], execution: dict[str, Any]
) -> Collective:
  kind, devices = core.opcode.removesuffix("-start"), math.prod(mesh.values())
  if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
    kind = "reduce-scatter"
  pairs = core.attribute(r"source_target_pairs=\{(.*?)\}\}")
  groups = _groups(core.text, devices)
  if pairs:  # [moves, 2], without the chips that keep their array
    numbers = np.asarray([int(n) for n in re.findall(r"\d+", pairs)]).reshape(-1, 2)
    moves = numbers[numbers[:, 0] != numbers[:, 1]]
    groups = moves if len(moves) else np.zeros((1, 1), int)
  axes = None if groups is None else _axes(groups, mesh)
  chips = devices if groups is None else len(groups[0])
  if pairs and axes:  # a ring along axes, though each chip only knows its neighbour
    chips = math.prod(mesh[axis] for axis in axes)
  arrays = [array for operand in computation.operands(core) for array in operand.result]
  if kind == "all-gather":
    along = int(core.attribute(r"[ ,]dimensions=\{(\d+)\}"))
    gathered = [[chips * size if i == along else size for i, size in enumerate(array.dims)] for array in arrays]
    arrays = [dataclasses.replace(array, dims=tuple(dims)) for array, dims in zip(arrays, gathered)]
  op = core.attribute(r'op_name="([^"]*)"') or ""
  slices = math.prod(mesh.get(axis, 1) for axis in (mesh if axes is None else axes) if axis == SLICES)
  return Collective(kind, tuple(arrays), axes, chips, op=op, slices=slices, **execution)


def _between_slices(computation: hlo.Computation, send: hlo.Instruction, slices: int, times: float) -> Collective:
  """The collective between slices that a chip begins with a transfer to the runtime."""
  kind = send.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
  kind = kind if kind in KINDS else "collective-permute"
  arrays, op = computation.operands(send)[0].result, send.attribute(r'op_name="([^"]*)"') or ""
  return Collective(kind, tuple(arrays), (SLICES,), slices, times, True, False, op, slices)


def _groups(text: str, devices: int) -> np.ndarray | None:
  """Numbers of devices [groups, N], from any notation of replica groups; None: the notation is not known."""
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
  numbers = _iota(named[2] or f"[{math.prod(sizes.values())}]")
  if numbers is None:
    return None
  numbers = numbers.reshape(*sizes.values()).transpose(*others, *along)
  return numbers.reshape(-1, math.prod(numbers.shape[len(others) :]))


def _iota(text: str) -> np.ndarray | None:
  """Numbers from 0, shaped [4,2], transposed and flattened, for "[4,2]T(1,0)"; None: another notation."""
  match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  if match is None:
    return None
  dims = [int(n) for n in match[1].split(",")]
  order = [int(n) for n in match[2].split(",")] if match[2] else range(len(dims))
  return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1)


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...] | None:
  """The axes of the mesh along which the devices of a group lie."""
  if groups.max() >= math.prod(mesh.values()):
    return None
  coordinates = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, N]
  varies = np.any(coordinates != coordinates[..., :1], axis=(1, 2))
  return tuple(itertools.compress(mesh, varies))


def _moved(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
  """Bytes that one instruction reads from and writes to HBM."""
  opcode = instruction.opcode
  if opcode in FREE or opcode.endswith("-done") or opcode.removesuffix("-start") in COMMUNICATION:
    return 0
  operands = [operand.result for operand in computation.operands(instruction)]
  if opcode == "fusion":
    return _fused(module, instruction, operands)
  if opcode == "custom-call":  # a kernel that takes one array several times is taken to read its parts
    operands = list({one.name: one.result for one in computation.operands(instruction)}.values())
  if opcode == "custom-call" and (not operands or "ConcatBitcast" in instruction.text):  # without operands: allocation
    return 0
  if opcode in ("copy-start", "slice-start"):  # results: (target, ...) and ((source), target, ...)
    target = instruction.result[0 if opcode == "copy-start" else len(operands)]
    return _in_hbm(target) + (target.padded_bytes if operands[0][0].space == hlo.HBM else 0)
  written = sum(map(_in_hbm, instruction.result))
  if opcode in SLICING:
    return written + _part(instruction.result, operands[0])
  if opcode in IN_PLACE:
    return _part(operands[IN_PLACE[opcode]], instruction.result) + sum(map(_in_hbm, operands[1]))
  return written + sum(map(_in_hbm, itertools.chain(*operands)))


def _fused(module: hlo.Module, fusion: hlo.Instruction, operands: list[tuple[hlo.Array, ...]]) -> int:
  """Bytes of a fusion, which reads its operands and writes its results, or slices of them."""
  inner = module.computations[fusion.called[0]]
  if "all-reduce-scatter" in inner.name:
    return 0
  read = sum(_read(module, inner, _parameter(inner, number), arrays) for number, arrays in enumerate(operands))
  outputs = inner.operands(inner.root) if inner.root.opcode == "tuple" else [inner.root]
  if len(outputs) != len(fusion.result):  # the state of an asynchronous collective
    return read
  return read + sum(_written(module, inner, output, array) for output, array in zip(outputs, fusion.result))


def _read(module: hlo.Module, inner: hlo.Computation, name: str, arrays: tuple[hlo.Array, ...]) -> int:
  """Bytes that a fusion reads of one operand, called `name` inside."""
  whole = sum(map(_in_hbm, arrays))
  if not whole:
    return 0
  total = 0
  for reader in inner.readers(name):
    first = reader.operands[0] == name
    if reader.opcode in SLICING and first:
      total += _part(reader.result, arrays)
    elif reader.opcode == "bitcast":
      total += _read(module, inner, reader.name, arrays)
    elif reader.opcode == "fusion":
      nested = module.computations[reader.called[0]]
      numbers = [number for number, operand in enumerate(reader.operands) if operand == name]
      total += sum(_read(module, nested, _parameter(nested, number), arrays) for number in numbers)
    elif reader.opcode not in (*COMMUNICATION, "tuple") and not (reader.opcode in IN_PLACE and first):
      total += 0 if "AsyncCollective" in reader.text else whole
  return min(total, whole)


def _written(module: hlo.Module, inner: hlo.Computation, output: hlo.Instruction, array: hlo.Array) -> int:
  """Bytes that a fusion writes of one result."""
  while output.opcode == "bitcast":
    output = inner.by_name[output.operands[0]]
  if output.opcode == "fusion" and len(output.result) == 1:
    nested = module.computations[output.called[0]]
    return _written(module, nested, nested.root, array)
  if output.opcode in ("parameter", *COMMUNICATION) or "AsyncCollective" in output.text:
    return 0
  if output.opcode in IN_PLACE:
    return _part(inner.operands(output)[IN_PLACE[output.opcode]].result, (array,))
  return _in_hbm(array)


def _parameter(computation: hlo.Computation, number: int) -> str:
  """The name of a computation's parameter."""
  parameters = (i for i in computation.instructions if i.opcode == "parameter")
  return next(i.name for i in parameters if int(i.operands[0]) == number)


def _in_hbm(array: hlo.Array) -> int:
  """An array's padded bytes, if it lies in HBM; scalars count nothing."""
  return array.padded_bytes if array.space == hlo.HBM and array.elements > 1 else 0


def _part(part: tuple[hlo.Array, ...], whole: tuple[hlo.Array, ...]) -> int:
  """The bytes of a part of arrays, if the whole lies in HBM."""
  return sum(array.bytes for array in part) if whole[0].space == hlo.HBM else 0
