"""How often each part of a compiled program is executed: loops are read for what they count from and to."""

import math
import re
from collections.abc import Iterator, Sequence

from eqm_jax.plan import hlo


def executed(module: hlo.Module, unknown_trips: Sequence[int] = ()) -> Iterator[tuple[hlo.Computation, float]]:
  """The computations whose instructions are run one by one, and how often; what fusions hold is not among them.

  Of a conditional, the branch with the fewest instructions is taken.

  Args:
    module: the program.
    unknown_trips: of its outermost loops whose number of turns depends on data, in the order in which they come. Those
      beyond, and such loops within loops, turn once.
  """
  unknown = iter(unknown_trips)

  def visit(name: str, times: float):
    computation = module.computations[name]
    yield computation, times
    for instruction in computation.instructions:
      if instruction.opcode == "while":
        trips = trip_count(module, computation, instruction)
        if trips is None:
          trips = next(unknown, 1) if name == module.entry else 1
        yield from visit(instruction.attribute(r"body=%([^\s,)]+)"), times * trips)
      elif instruction.opcode == "conditional":
        yield from visit(min(instruction.called, key=lambda name: len(module.computations[name].instructions)), times)
      elif instruction.opcode in ("call", "async-start"):
        for called in instruction.called:
          yield from visit(called, times)

  return visit(module.entry, 1)


def trip_count(module: hlo.Module, computation: hlo.Computation, loop: hlo.Instruction) -> int | None:
  """How often a `while` turns, where it counts from one constant to another; else None."""
  if known := loop.attribute(r'known_trip_count"?[=:]\s*\{"?n"?:"?(\d+)'):
    return int(known)
  condition, body = (module.computations[loop.attribute(rf"{part}=%([^\s,)]+)")] for part in ("condition", "body"))
  start = computation.operands(loop)[0]

  def before(index: int) -> int | None:
    """What an element of the loop's tuple is at first."""
    return _constant(computation, start.operands[index]) if start.opcode == "tuple" else None

  compared = _comparison(module, condition)
  if compared is None:
    return None
  index, limit, direction = compared
  limit = limit if isinstance(limit, int) else before(limit[0])
  first, step = before(index), _step(module, body, index, before)
  if None in (limit, first, step) or not step:
    return None
  beyond = {"LT": limit, "LE": limit + 1, "GT": limit, "GE": limit - 1, "NE": limit}.get(direction)
  return None if beyond is None else max(0, math.ceil((beyond - first) / step))


def _comparison(module: hlo.Module, condition: hlo.Computation) -> tuple[int, int | tuple[int], str] | None:
  """(index in the tuple, limit or (its index,), direction) of a loop's condition."""
  root, within = condition.root, condition
  names = list(root.operands)
  if root.opcode == "fusion":  # the comparison alone, with its parameters in the order of the operands
    inner = module.computations[root.called[0]]
    compare = inner.root
    names = [_outer(inner, name, root) for name in compare.operands]
  else:
    compare = root
  if compare.opcode != "compare" or len(names) != 2:
    return None
  sides = []
  for name in names:
    value = name if isinstance(name, int) else _constant(within, name)
    sides.append(value if value is not None else _element(within, name))
  direction = compare.attribute(r"direction=(\w+)")
  if isinstance(sides[0], int) and isinstance(sides[1], tuple):  # limit > counter
    sides, direction = sides[::-1], {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
  if not isinstance(sides[0], tuple) or sides[1] is None:
    return None
  return sides[0][0], sides[1], direction


def _step(module: hlo.Module, body: hlo.Computation, index: int, before) -> int | None:
  """What a turn adds to an element of the loop's tuple."""
  if body.root.opcode != "tuple":
    return None
  within, added = body, body.by_name.get(body.root.operands[index])
  while added is not None and added.opcode in ("copy", "bitcast"):
    added = within.by_name.get(added.operands[0])
  if added is None:
    return None
  names = list(added.operands)
  if added.opcode == "fusion":
    inner = module.computations[added.called[0]]
    names = [_outer(inner, name, added) for name in inner.root.operands]
    if inner.root.opcode != "add":
      return None
  elif added.opcode != "add":
    return None
  values = [name if isinstance(name, int) else _constant(within, name) for name in names]
  elements = [None if isinstance(name, int) else _element(within, name) for name in names]
  for value, element, other in zip(values, elements, reversed(elements)):
    if other == (index,):
      return value if value is not None else (before(element[0]) if element else None)
  return None


def _outer(inner: hlo.Computation, name: str, fusion: hlo.Instruction) -> int | str:
  """What a name inside a fusion is outside: a constant's value, or the operand that a parameter stands for."""
  instruction = inner.by_name[name]
  if instruction.opcode == "parameter":
    return fusion.operands[int(instruction.operands[0])]
  value = _constant(inner, name)
  return name if value is None else value


def _constant(computation: hlo.Computation, name: str) -> int | None:
  """The whole number that an instruction is, if it is one."""
  instruction = computation.by_name.get(name)
  while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
    instruction = computation.by_name.get(instruction.operands[0])
  if instruction is None or instruction.opcode != "constant":
    return None
  value = instruction.operands[0] if instruction.operands else ""
  return int(value) if re.fullmatch(r"-?\d+", value) else None


def _element(computation: hlo.Computation, name: str) -> tuple[int] | None:
  """(index,) of an element of the computation's one parameter."""
  instruction = computation.by_name.get(name)
  while instruction is not None and instruction.opcode in ("copy", "bitcast"):
    instruction = computation.by_name.get(instruction.operands[0])
  if instruction is None or instruction.opcode != "get-tuple-element":
    return None
  if computation.by_name[instruction.operands[0]].opcode != "parameter":
    return None
  return (int(instruction.attribute(r"index=(\d+)")),)
