"""TPU slices by name, as devices that programs can be compiled for and that are not there.

libtpu compiles for a slice on any machine: for it, `on_any_machine` says that this one has no TPU, before JAX looks.
"""

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies

from eqm_jax import hardware

INSTALL = 'pip install "eqm_jax[plan]"'
# What libtpu asks of a machine that has no TPU, and leave to be loaded by several processes at once.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
SYNONYMS = {"v5litepod": "v5e", "v5lite": "v5e"}
# Chips along each axis, by the number in a product's name: of chips (v5e, v6e) or TensorCores, two a chip (v4, v5p).
# Cloud TPU's documentation: "TPU v5e", "TPU v6e", "TPU v5p", "TPU v4", each under "configurations".
PLANES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"}
SLICES = {"v5e": PLANES, "v6e": PLANES, "v4": CUBES, "v5p": CUBES}
# A device of a v4 slice is a chip, its two TensorCores together; libtpu's own default is one device a core.
OPTIONS = {"v4": {"chip_config_name": "megacore"}}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice."""

  name: str  # as libtpu has it, "v5e:4x4"
  product: str  # "v5e-16", or its name where no product has this shape
  devices: tuple[jax.Device, ...]  # one a chip
  chip: hardware.Chip

  @property
  def file(self) -> str:
    """The name without what a file's may not have."""
    return self.name.replace(":", "_")


def on_any_machine():
  """Settles that this process only compiles. To be called before anything asks JAX for its devices.

  The devices of this machine are then its CPUs, whatever it has; libtpu is told what a TPU machine would tell it,
  unless the environment says something else.
  """
  jax.config.update("jax_platforms", "cpu")
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def open_topologies(names: str) -> list[Topology]:
  """The slices of a list such as "v5e:4x4,v4-32".

  Raises:
    ValueError: for a slice that is not known, naming those that are, and without libtpu.
  """
  given = [name.strip() for name in names.split(",") if name.strip()]
  if not given:
    raise ValueError(f"--mode=plan needs --topology=…, one or more of: {_known()}")
  described = [_described(name) for name in given]
  _load_libtpu()
  return [_opened(*one) for one in described]


def _described(name: str) -> tuple[str, str, str]:
  """(the name given, generation, shape)."""
  found = re.fullmatch(r"(v\d+\w*?)(?::(\d+(?:x\d+)+)|-(\d+))", name)
  generation = SYNONYMS.get(found[1], found[1]) if found else ""
  shape = found and (found[2] or SLICES.get(generation, {}).get(int(found[3])))
  if generation not in SLICES or not shape:
    raise ValueError(f"--topology={name} is not known: give one or more of {_known()}")
  return name, generation, shape


def _opened(given: str, generation: str, shape: str) -> Topology:
  name = f"{generation}:{shape}"
  try:
    devices = topologies.get_topology_desc(name, "tpu", **OPTIONS.get(generation, {})).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f"--topology={given}: libtpu refuses it ({reason}): give one or more of {_known()}") from error
  chip, chips = hardware.chip_of(devices[0].device_kind), math.prod(map(int, shape.split("x")))
  if chip is None or len(devices) != chips:
    raise ValueError(
      f"--topology={given}: libtpu has {len(devices)} devices of {devices[0].device_kind!r} for {chips} chips, "
      "which hardware.py does not know: another version of libtpu may"
    )
  product = {chips: f"{generation}-{number}" for number, chips in SLICES[generation].items()}.get(shape, name)
  return Topology(name, product, tuple(devices), chip)


def _load_libtpu():
  try:
    import libtpu
  except ImportError as error:
    raise ValueError(f"--mode=plan compiles with libtpu, which is not installed: {INSTALL}") from error
  os.environ.setdefault("TPU_LIBRARY_PATH", libtpu.get_library_path())


def _known() -> str:
  products = [
    f"{generation}-{{{','.join(map(str, slices))}}}, {generation}:{next(iter(reversed(slices.values())))} and such"
    for generation, slices in SLICES.items()
  ]
  return "; ".join(products)
