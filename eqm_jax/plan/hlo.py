"""Compiled programs as text: their instructions, the sizes of their arrays in memory, how often their loops turn.

The text is that of `jax.stages.Compiled.as_text()` for a TPU: scheduled HLO, whose layouts name tiles and the memory
space, `f32[32,384]{1,0:T(8,128)S(1)}`. A loop's body appears once; `executed` says how often it runs.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence

HBM = 0  # the memory space that layouts leave out; S(1) is the vector memory on the chip, S(2) to S(6) are smaller
BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128, "bf16": 16}  # of types whose name does not end in its bits
UNCHANGED = ("copy", "bitcast", "convert", "reshape")  # opcodes that pass a number on
COMPARISONS = {name: getattr(operator, name.lower()) for name in ("EQ", "NE", "LT", "LE", "GT", "GE")}
MOST_TURNS = 100_000  # of a loop that is counted

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*?)\s([a-z][\w-]*)\(")  # name, shape of the result, opcode
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([^\s,)}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array as it is laid out in memory."""

  dtype: str
  dims: tuple[int, ...]
  minor_to_major: tuple[int, ...] = ()
  tiles: tuple[tuple[int, ...], ...] = ()
  space: int = HBM

  @property
  def itemsize(self) -> float:
    """Bytes of one element."""
    bits = BITS.get(self.dtype)
    return (int(re.match(r"[a-z]+(\d+)", self.dtype)[1]) if bits is None else bits) / 8

  @property
  def elements(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Bytes of the elements alone, without padding."""
    return math.ceil(self.elements * self.itemsize)

  @property
  def padded_bytes(self) -> int:
    """Bytes of whole tiles, which are what the chip stores and moves."""
    if not self.tiles:
      return self.bytes
    sizes = [self.dims[axis] for axis in reversed(self.minor_to_major)] if self.minor_to_major else list(self.dims)
    tile = list(self.tiles[0])
    sizes = [1] * (len(tile) - len(sizes)) + sizes
    for inner in self.tiles[1:]:  # tiles within the tile, such as pairs of bfloat16 rows
      if len(inner) <= len(tile):
        tile[-len(inner) :] = map(_round_up, tile[-len(inner) :], inner)
    sizes[-len(tile) :] = map(_round_up, sizes[-len(tile) :], tile)
    return math.ceil(math.prod(sizes) * self.itemsize)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  result: tuple[Array, ...]  # the arrays of a tuple one after another
  operands: tuple[str, ...]  # names; of a constant or parameter its value or number
  text: str  # what follows the operands
  is_root: bool

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """The names of the computations that it calls."""
    branches = _BRANCHES.search(self.text)
    named = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
    return (*_CALLED.findall(self.text), *named)

  def attribute(self, pattern: str) -> str | None:
    """The first group of a regular expression found in the text after the operands."""
    match = re.search(pattern, self.text)
    return match[1] if match else None


class Computation:
  """Instructions in their order."""

  def __init__(self, name: str, instructions: Sequence[Instruction]):
    self.name = name
    self.instructions = tuple(instructions)
    self.by_name = {instruction.name: instruction for instruction in instructions}

  @property
  def root(self) -> Instruction:
    return next(instruction for instruction in self.instructions if instruction.is_root)

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """The instructions that `instruction` reads."""
    return [self.by_name[name] for name in instruction.operands if name in self.by_name]

  def readers(self, name: str) -> list[Instruction]:
    """The instructions that read the one called `name`."""
    return [instruction for instruction in self.instructions if name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program."""

  computations: Mapping[str, Computation]
  entry: str

  @property
  def entry_computation(self) -> Computation:
    return self.computations[self.entry]


def parse(text: str) -> Module:
  """Reads the text of a program.

  Raises:
    ValueError: if it has no entry computation.
  """
  computations, lines = {}, []
  entry = name = None
  for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
    if header := _COMPUTATION.match(line):
      name, lines = header[2], []
      entry = name if header[1] else entry
    elif name is not None and line.startswith("}"):
      computations[name], name = Computation(name, lines), None
    elif name is not None and (match := _INSTRUCTION.match(line)):
      end = _closing(line, match.end() - 1)
      inside = line[match.end() : end].strip()
      operands = tuple(re.findall(r"%([^\s,()]+)", inside)) or ((inside,) if inside else ())
      lines.append(Instruction(match[2], match[4], arrays(match[3]), operands, line[end + 1 :], bool(match[1])))
  if entry is None:
    raise ValueError(f"{text[:80]!r} is no compiled program: pass the text of jax.stages.Compiled.as_text()")
  return Module(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
  """All arrays that a piece of text names, in its order."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(text):
    order, _, rest = layout.partition(":")
    tiles, space = re.match(r"T((?:\([\d,*]+\))+)", rest), re.search(r"S\((\d+)\)", rest)
    tiles = tuple(map(_integers, re.findall(r"\(([\d,]+)\)", tiles[1] if tiles else "")))
    found.append(Array(dtype, _integers(dims), _integers(order), tiles, int(space[1]) if space else HBM))
  return tuple(found)


def executed(module: Module, unknown_trips: Sequence[int] = ()) -> Iterator[tuple[Computation, float]]:
  """The computations whose instructions run one by one, and how often; the insides of fusions are not among them.

  Of a conditional, the branch with the fewest instructions is taken.

  `unknown_trips` are for the outermost loops whose trip count depends on data, in the order in which they come;
  further ones, and such loops within loops, turn once.
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


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
  """How often a `while` turns, where that follows from constants; else None."""
  if known := loop.attribute(r'known_trip_count"?[=:]\s*\{"?n"?:"?(\d+)'):
    return int(known)
  condition, body = (module.computations[loop.attribute(rf"{part}=%([^\s,)]+)")] for part in ("condition", "body"))
  start = computation.operands(loop)[0]
  if start.opcode != "tuple" or body.root.opcode != "tuple":
    return None
  state = [_value(module, computation, name, []) for name in start.operands]
  for turns in range(MOST_TURNS):
    running = _value(module, condition, condition.root.name, state)
    if not running:
      return None if running is None else turns
    state = [_value(module, body, name, state) for name in body.root.operands]
  return None


def _value(module: Module, computation: Computation, name: str, arguments: Sequence[int | None]) -> int | None:
  """A whole number, if constants and `arguments` (of a fusion, or the state of a loop) determine it; else None."""
  instruction = computation.by_name.get(name)
  if instruction is None or [array.dims for array in instruction.result] != [()]:
    return None
  opcode, operands = instruction.opcode, instruction.operands
  if opcode == "constant":
    return int(operands[0]) if re.fullmatch(r"-?\d+", "".join(operands)) else None
  if opcode == "parameter":
    return arguments[int(operands[0])] if arguments else None
  if opcode == "get-tuple-element":
    is_state = arguments and computation.by_name[operands[0]].opcode == "parameter"
    return arguments[int(instruction.attribute(r"index=(\d+)"))] if is_state else None
  values = [_value(module, computation, operand, arguments) for operand in operands]
  if opcode == "fusion":
    inner = module.computations[instruction.called[0]]
    return _value(module, inner, inner.root.name, values)
  if None in values:
    return None
  if opcode == "compare":
    return COMPARISONS[instruction.attribute(r"direction=(\w+)")](*values)
  if opcode == "add":
    return sum(values)
  return values[0] if opcode in UNCHANGED else None


def _closing(text: str, opening: int) -> int:
  depth = 0
  for position in range(opening, len(text)):
    depth += {"(": 1, ")": -1}.get(text[position], 0)
    if not depth:
      return position
  raise ValueError(f"{text[:80]!r} opens a parenthesis that it does not close: pass the whole text of a program")


def _integers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(",") if number)


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
