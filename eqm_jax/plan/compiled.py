"""From a program to its figures: compiled for a slice, or found not to fit."""

import dataclasses
import logging
import re
import time

import jax

from eqm_jax.equilibrium import streaming
from eqm_jax.hardware import Chip
from eqm_jax.plan import collectives, hlo, placement, roofline, traffic
from eqm_jax.plan.programs import SAMPLING, Program
from eqm_jax.plan.topology import Topology

# Of the memory that a program may use, what is left for batches that are read ahead, samples that wait to be fetched,
# and gaps between arrays.
RESERVE = 0.05
AGAIN = re.compile(r"\.remat\d*(\.\d+)*$")  # of instructions that XLA computes again of its own accord

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Figures:
  """What is known of a compiled program. Numbers are of one chip; times and bytes of one unit of the program."""

  program: Program
  chip: Chip
  seconds: float  # that compilation took
  memory: dict[str, int]  # bytes: arguments, outputs, aliased (outputs in the place of arguments), temporaries, code
  needed: int  # bytes at one time
  fits: bool
  refused: str  # what XLA says of a program that is too large to be compiled; "": it was compiled
  operations: float = 0.0
  hbm_bytes: float = 0.0
  collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  bound: roofline.Roofline | None = None
  critical_batch: float = 0.0
  warnings: tuple[str, ...] = ()

  @property
  def seconds_at_mfu(self) -> float:
    """Of one unit, at `roofline.MFU` of the chip's peak."""
    return self.operations / (roofline.MFU * self.chip.flops)

  @property
  def images_per_second(self) -> float:
    """On one chip at the bound, by this program alone."""
    return self.program.images / self.program.shared_by / (self.program.evaluations * self.bound.seconds)


def compile_program(program: Program, topology: Topology) -> Figures:
  """Compiles a program and reads its figures."""
  chip = topology.chip
  log.info("%s, %s: compiling for %s …", program.kind, program.about, topology.name)
  begin = time.monotonic()
  try:
    compiled = program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _refused(program, chip, time.monotonic() - begin, str(error))
  seconds = time.monotonic() - begin
  memory = _memory(compiled)
  needed = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"] + memory["code"]
  fits = needed <= (1 - RESERVE) * chip.usable_memory
  log.info("  %.0f s; %.2f of %.2f GiB", seconds, needed / 2**30, chip.usable_memory / 2**30)
  return _read(program, chip, compiled, Figures(program, chip, seconds, memory, needed, fits, ""))


def _read(program: Program, chip: Chip, compiled: jax.stages.Compiled, figures: Figures) -> Figures:
  module = hlo.parse(compiled.as_text())
  units, trips = program.units, _trips(program)
  sent = collectives.find(module, program.mesh, trips)
  moved = traffic.hbm_bytes(module, trips) / units
  operations = program.operations
  if operations is None:  # without loops the compiler counts right
    operations = compiled.cost_analysis()["flops"]
  asynchronous, synchronous = (
    sum(one.bytes for one in sent if one.asynchronous == wanted) / units for wanted in (True, False)
  )
  bound = roofline.roofline(chip, operations + program.again, moved, asynchronous, synchronous)
  critical = roofline.critical_batch(chip, operations / program.images, program.fixed_hbm, asynchronous + synchronous)
  return dataclasses.replace(
    figures,
    operations=operations,
    hbm_bytes=moved,
    collectives=collectives.by_kind(sent),
    bound=bound,
    critical_batch=critical,
    warnings=(
      *program.warnings,
      *placement.misplaced(compiled, program.given, program.asked),
      *_reshardings(program, sent, asynchronous + synchronous),
      *_small_batch(program, bound, critical),
      *_done_again(module),
    ),
  )


def _trips(program: Program) -> list[int]:
  """Turns of sampling's loops, which end by the data: all in the first, with all slots, none in those with fewer."""
  return [program.units] + [0] * streaming.HALVINGS if program.kind == SAMPLING else []


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  told = compiled.memory_analysis()
  return {
    "arguments": told.argument_size_in_bytes,
    "outputs": told.output_size_in_bytes,
    "aliased": told.alias_size_in_bytes,
    "temporaries": told.temp_size_in_bytes,
    "code": told.generated_code_size_in_bytes,
  }


def _refused(program: Program, chip: Chip, seconds: float, text: str) -> Figures:
  """Of a program that XLA does not compile, the number that it tells."""
  told = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", text)
  needed = int(float(told[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[told[2]]) if told else 0
  line = next(line for line in text.splitlines() if "RESOURCE_EXHAUSTED" in line)
  log.info("  %.0f s; does not fit: %.2f of %.2f GiB", seconds, needed / 2**30, chip.usable_memory / 2**30)
  return Figures(program, chip, seconds, {}, needed, False, line, warnings=program.warnings)


def _reshardings(program: Program, sent: list[collectives.Collective], total: float) -> list[str]:
  if program.parameters is None:
    return []
  told, rest = placement.reshardings(sent, program.parameters, program.mesh)
  found = [
    f"{one.kind} of {one.shape} over {' and '.join(one.axes)}, {one.bytes / 2**20:.1f} MiB a step "
    f"({100 * one.bytes / total:.1f} % of all), which no sharding rule asks for: {one.op or 'of no named operation'}"
    for one in told
  ]
  if rest > 0.01 * total:
    found.append(f"smaller arrays that no sharding rule asks to move: {rest / 2**20:.1f} MiB a step together")
  return found


def _small_batch(program: Program, bound: roofline.Roofline, critical: float) -> list[str]:
  if program.images >= critical:
    return []
  return [
    f"{program.images} images on a chip are fewer than the {critical:.0f} whose arithmetic takes as long as moving "
    "weights, state and gradients: a larger batch, or fewer chips, would use them better"
  ]


def _done_again(module: hlo.Module) -> list[str]:
  count = sum(bool(AGAIN.search(i.name)) for c in module.computations.values() for i in c.instructions)
  if not count:
    return []
  return [f"XLA itself computes {count} operations again to save memory: it is nearly full"]
