"""How many bytes a compiled program moves between the chip's arithmetic and its HBM.

Counted from the scheduled program, instruction by instruction: what it reads of arrays that lie in HBM and what it
writes there, tiles and padding included, times the turns of the loops around it. Arrays that the compiler keeps in
vector memory cost nothing. Of an array of which only a slice is taken or replaced, the slice counts. What collectives
read and write is left out, since it moves with the bytes on the links.

It is an estimate: a fusion that reads an array twice is counted once, a copy that XLA puts into vector memory ahead of
its use once too.
"""

from collections.abc import Sequence

from eqm_jax.plan import hlo, loops
from eqm_jax.plan.collectives import KINDS

FREE = (
  "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
  "opt-barrier add-dependency domain iota get-dimension-size"
).split()
SLICING = ("dynamic-slice", "slice", "gather")
COLLECTIVES = (*KINDS, "async", "send", "recv")


def hbm_bytes(module: hlo.Module, unknown_trips: Sequence[int] = ()) -> float:
  """Bytes read from and written to HBM by one execution, on one chip.

  Args:
    module: the program.
    unknown_trips: as of `loops.executed`.
  """
  total = 0.0
  for computation, times in loops.executed(module, unknown_trips):
    total += times * sum(_moved(module, computation, instruction) for instruction in computation.instructions)
  return total


def _moved(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
  opcode = instruction.opcode
  if opcode in FREE or opcode.endswith("-done") or opcode.removesuffix("-start") in COLLECTIVES:
    return 0
  given = [operand.result for operand in computation.operands(instruction)]
  if opcode == "fusion":
    return _fused(module, instruction, given)
  if opcode == "custom-call" and not given:  # an allocation
    return 0
  if opcode in ("copy-start", "slice-start"):  # → (what arrives, ...) and ((what is sliced), what arrives, ...)
    arrives = instruction.result[0 if opcode == "copy-start" else len(given)]
    return _in_hbm(arrives) + (arrives.padded_bytes if given[0][0].space == hlo.HBM else 0)
  if opcode == "custom-call" and "ConcatBitcast" in instruction.text:
    return 0
  if opcode in SLICING:
    return sum(map(_in_hbm, instruction.result)) + _as_large(instruction.result, given[0])
  if opcode in ("dynamic-update-slice", "scatter"):
    return _as_large(given[-1 if opcode == "scatter" else 1], instruction.result) + sum(map(_in_hbm, given[1]))
  return sum(map(_in_hbm, instruction.result)) + sum(_in_hbm(array) for arrays in given for array in arrays)


def _fused(module: hlo.Module, fusion: hlo.Instruction, given: list[tuple[hlo.Array, ...]]) -> int:
  """Of a fusion, which reads its operands and writes its results, if not slices of them."""
  inner = module.computations[fusion.called[0]]
  if "all-reduce-scatter" in inner.name:
    return 0
  parameters = {int(i.operands[0]): i for i in inner.instructions if i.opcode == "parameter"}
  read = sum(_read(module, inner, parameters[number].name, arrays) for number, arrays in enumerate(given))
  outputs = inner.operands(inner.root) if inner.root.opcode == "tuple" else [inner.root]
  if len(outputs) != len(fusion.result):  # an asynchronous collective's own state
    return read
  return read + sum(_written(module, inner, output, array) for output, array in zip(outputs, fusion.result))


def _read(module: hlo.Module, inner: hlo.Computation, name: str, arrays: tuple[hlo.Array, ...]) -> int:
  """Bytes read of a fusion's operand."""
  whole = sum(map(_in_hbm, arrays))
  if not whole:
    return 0
  total = 0
  for reader in inner.readers(name):
    first = reader.operands[0] == name
    if reader.opcode in SLICING and first:
      total += _as_large(reader.result, arrays)
    elif reader.opcode == "bitcast":
      total += _read(module, inner, reader.name, arrays)
    elif reader.opcode == "fusion":
      nested = module.computations[reader.called[0]]
      for number, operand in enumerate(reader.operands):
        if operand == name:
          parameter = next(i for i in nested.instructions if i.opcode == "parameter" and i.operands[0] == str(number))
          total += _read(module, nested, parameter.name, arrays)
    elif not (
      (reader.opcode in ("dynamic-update-slice", "scatter") and first)  # replaced in place
      or reader.opcode in (*COLLECTIVES, "tuple")
      or "AsyncCollective" in reader.text
    ):
      total += whole
  return min(total, whole)


def _written(module: hlo.Module, inner: hlo.Computation, output: hlo.Instruction, array: hlo.Array) -> int:
  """Bytes written of a fusion's result."""
  while output.opcode == "bitcast":
    output = inner.by_name[output.operands[0]]
  if output.opcode == "fusion" and len(output.result) == 1:
    nested = module.computations[output.called[0]]
    return _written(module, nested, nested.root, array)
  if output.opcode in ("parameter", *COLLECTIVES) or "AsyncCollective" in output.text:
    return 0
  if output.opcode in ("dynamic-update-slice", "scatter"):
    operands = inner.operands(output)
    return _as_large(operands[-1 if output.opcode == "scatter" else 1].result, (array,))
  return _in_hbm(array)


def _in_hbm(array: hlo.Array) -> int:
  """Its bytes, if it lies in HBM; single numbers are nothing."""
  return array.padded_bytes if array.space == hlo.HBM and array.elements > 1 else 0


def _as_large(part: tuple[hlo.Array, ...], where: tuple[hlo.Array, ...]) -> int:
  """The bytes of a part of arrays, if those lie in HBM."""
  return sum(array.bytes for array in part) if where[0].space == hlo.HBM else 0
