"""Compiled programs as text: their instructions, and how large arrays are in memory.

The text is that of `jax.stages.Compiled.as_text()` for a TPU: scheduled HLO, whose layouts tell tiles and the memory
space, `f32[32,384]{1,0:T(8,128)S(1)}`. A loop's body appears once; `loops.executed` says how often it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

HBM = 0  # the memory space that layouts leave out; S(1) is the vector memory on the chip, S(2) to S(6) are smaller
BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128, "bf16": 16}  # of types whose name does not end in its bits

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([^\s,)}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array as it lies in memory."""

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
    """Of its elements alone."""
    return math.ceil(self.elements * self.itemsize)

  @property
  def padded_bytes(self) -> int:
    """With what fills up its tiles, which the chip stores and moves along."""
    sizes = [self.dims[axis] for axis in reversed(self.minor_to_major)] if self.minor_to_major else list(self.dims)
    if not self.tiles:
      return self.bytes
    tile = list(self.tiles[0])
    sizes = [1] * (len(tile) - len(sizes)) + sizes
    for inner in self.tiles[1:]:  # tiles within the tile, such as pairs of bfloat16 rows
      if len(inner) <= len(tile):
        tile[-len(inner) :] = [_up(size, part) for size, part in zip(tile[-len(inner) :], inner)]
    sizes[-len(tile) :] = [_up(size, part) for size, part in zip(sizes[-len(tile) :], tile)]
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
    """The computations that it names."""
    branches = _BRANCHES.search(self.text)
    named = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
    return (*_CALLED.findall(self.text), *named)

  def attribute(self, pattern: str) -> str | None:
    """The first group of a regular expression found in what follows the operands."""
    found = re.search(pattern, self.text)
    return found[1] if found else None


class Computation:
  """Instructions in their order."""

  def __init__(self, name: str, instructions: Sequence[Instruction]):
    self.name, self.instructions = name, tuple(instructions)
    self.by_name: Mapping[str, Instruction] = {instruction.name: instruction for instruction in instructions}

  @property
  def root(self) -> Instruction:
    return next(instruction for instruction in self.instructions if instruction.is_root)

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """The instructions that an instruction reads."""
    return [self.by_name[name] for name in instruction.operands if name in self.by_name]

  def readers(self, name: str) -> list[Instruction]:
    """The instructions that read one."""
    return self._readers.get(name, [])

  @functools.cached_property
  def _readers(self) -> dict[str, list[Instruction]]:
    found = {}
    for instruction in self.instructions:
      for name in set(instruction.operands):
        found.setdefault(name, []).append(instruction)
    return found


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
    ValueError: if it is none.
  """
  computations, entry, lines, name = {}, None, [], None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      name, lines = header[2], []
      entry = name if header[1] else entry
    elif name is not None and line.startswith("}"):
      computations[name], name = Computation(name, lines), None
    elif name is not None and (found := _INSTRUCTION.match(line)):
      lines.append(_instruction(found, re.sub(r"/\*.*?\*/", "", line[found.end() :])))
  if entry is None:
    raise ValueError(f"no compiled program: {text[:80]!r}")
  return Module(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
  """All arrays that a piece of text names, in its order."""
  return tuple(_array(found) for found in _ARRAY.finditer(text))


def _instruction(found: re.Match, rest: str) -> Instruction:
  """From what follows "name = ": the result's shape, the opcode, its operands, the rest."""
  end = _closing(rest, 0) + 1 if rest.startswith("(") else re.match(r"\S*", rest).end()
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  inside = rest[opening + 1 : closing]
  operands = tuple(re.findall(r"%([^\s,()]+)", inside)) or ((inside.strip(),) if inside.strip() else ())
  return Instruction(found[2], rest[:opening], arrays(shape), operands, rest[closing + 1 :], bool(found[1]))


def _closing(text: str, opening: int) -> int:
  """Where the parenthesis that opens at `opening` closes."""
  depth = 0
  for place in range(opening, len(text)):
    depth += {"(": 1, ")": -1}.get(text[place], 0)
    if not depth:
      return place
  raise ValueError(f"a parenthesis does not close: {text[:80]!r}")


def _array(found: re.Match) -> Array:
  dims = tuple(int(size) for size in found[2].split(",") if size)
  layout = found[3] or ""
  order, _, rest = layout.partition(":")
  tiles = re.match(r"T((?:\([\d,*]+\))+)", rest)
  space = re.search(r"S\((\d+)\)", rest)
  return Array(
    dtype=found[1],
    dims=dims,
    minor_to_major=tuple(int(axis) for axis in order.split(",") if axis),
    tiles=tuple(
      tuple(int(size) for size in tile.split(",")) for tile in re.findall(r"\(([\d,]+)\)", tiles[1] if tiles else "")
    ),
    space=int(space[1]) if space else HBM,
  )


def _up(size: int, part: int) -> int:
  return -(-size // part) * part
