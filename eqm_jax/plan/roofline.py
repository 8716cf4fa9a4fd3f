"""How fast a program could at best be on a chip: its arithmetic, HBM traffic and links against the chip's rates.

    time ≥ max(FLOPs / peak, HBM bytes / bandwidth, asynchronous link bytes / link bandwidth)
           + synchronous link bytes / link bandwidth

It is a bound and no prediction (Williams, Waterman & Patterson 2009): every unit is taken to work at its stated rate
all the time, and what the program does not order one after another is taken to overlap. Synchronous collectives overlap
with nothing. Matrix products in float32 are counted at the bfloat16 rate: by default a TPU rounds their inputs to it.
"""

import dataclasses

from eqm_jax.hardware import Chip
from eqm_jax.networks import flops
from eqm_jax.networks.dit import DiT

MFU = 0.4  # model FLOPs utilization that a well-tuned transformer of this size reaches on TPUs


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of one execution on one chip, by what they are spent on."""

  arithmetic: float
  memory: float  # HBM
  overlapped: float  # links, by asynchronous collectives
  exposed: float  # links, by synchronous ones

  @property
  def seconds(self) -> float:
    """The bound."""
    return max(self.arithmetic, self.memory, self.overlapped) + self.exposed

  @property
  def limit(self) -> str:
    """What takes longest."""
    links = self.overlapped + self.exposed
    times = {"arithmetic": self.arithmetic, "HBM": self.memory, "links": links}
    return max(times, key=times.get)


def roofline(chip: Chip, operations: float, hbm_bytes: float, asynchronous: float, synchronous: float) -> Roofline:
  """The bound of one execution.

  Args:
    chip: whose rates.
    operations: floating-point operations, those that are done again among them.
    hbm_bytes: between HBM and the arithmetic.
    asynchronous, synchronous: bytes on the links out of a chip.
  """
  return Roofline(
    arithmetic=operations / chip.flops,
    memory=hbm_bytes / chip.memory_bandwidth,
    overlapped=asynchronous / chip.link_bandwidth,
    exposed=synchronous / chip.link_bandwidth,
  )


def critical_batch(chip: Chip, operations: float, fixed_hbm_bytes: float, fixed_link_bytes: float) -> float:
  """The images on a chip whose arithmetic takes as long as what a step moves however small its batch is.

  With fewer the chip waits for weights, optimizer state and gradients; from there on it waits at most for activations,
  which grow with the batch as the arithmetic does.

  Args:
    chip: whose rates.
    operations: of one image.
    fixed_hbm_bytes, fixed_link_bytes: of one step, whatever its batch.
  """
  fixed = max(fixed_hbm_bytes / chip.memory_bandwidth, fixed_link_bytes / chip.link_bandwidth)
  return fixed * chip.flops / operations


def done_again(model: DiT) -> int:
  """Operations of one training step for one image that rematerialisation adds to those of `flops.training`.

  "full" does the forward pass of every block again, "dots_no_batch" the two products of attention, "dots" and "none"
  no product. Of an energy, whose field is a derivative itself, blocks are counted as often as the field has them.
  """
  T = (model.input_size // model.patch_size) ** 2
  block = flops.forward(model.clone(depth=2)) - flops.forward(model.clone(depth=1))
  attention = 4 * T * T * model.width
  again = {"none": 0, "dots": 0, "dots_no_batch": attention, "full": block}[model.remat]
  return model.depth * again * (1 if model.energy == "none" else 2)
