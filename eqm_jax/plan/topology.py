"""TPU slices by name, as devices to compile for on a machine without them; several slices as `2xv5e-256`."""

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies

from eqm_jax import hardware

INSTALL = 'pip install "eqm_jax[plan]"'
# What libtpu expects of a TPU machine, and leave to be loaded by several processes at once.
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
  """A TPU slice."""

  name: str  # libtpu's, "v5e:4x4"; of several slices "2xv5e:4x4"
  product: str  # "v5e-16", or `name` where no product has this shape
  devices: tuple[jax.Device, ...]  # one a chip
  chip: hardware.Chip
  slices: int = 1


def on_any_machine():
  """Prepares this process to compile for TPUs and to run on CPUs; to be called before JAX looks for devices."""
  jax.config.update("jax_platforms", "cpu")
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def open_topologies(names: str) -> list[Topology]:
  """The slices of a list such as "v5e:4x4,v4-32".

  Raises:
    ValueError: for an unknown slice, with the known ones, and without libtpu.
  """
  requested = [name.strip() for name in names.split(",") if name.strip()]
  if not requested:
    raise ValueError(f"--topology={names} names no TPU slice, and --mode=plan needs --topology={_known()}")
  described = [(name, *_described(name)) for name in requested]  # all are checked before the first is opened
  try:
    import libtpu
  except ImportError as error:
    raise ValueError(f"--mode=plan compiles with libtpu, which is not installed: {INSTALL}") from error
  os.environ.setdefault("TPU_LIBRARY_PATH", libtpu.get_library_path())
  return [_opened(*one) for one in described]


def _described(name: str) -> tuple[str, str, int]:
  """(generation, shape) of a slice, and the number of slices."""
  match = re.fullmatch(r"(?:([1-9]\d*)x)?(v\d+\w*?)(?::(\d+(?:x\d+)+)|-(\d+))", name)
  generation = SYNONYMS.get(match[2], match[2]) if match else ""
  shape = match and (match[3] or SLICES.get(generation, {}).get(int(match[4])))
  if generation not in SLICES or not shape:
    raise ValueError(f"--topology={name} is no known TPU slice: give one or more of {_known()}")
  return generation, shape, int(match[1] or 1)


def _opened(requested: str, generation: str, shape: str, slices: int) -> Topology:
  name, chips = f"{generation}:{shape}", slices * math.prod(map(int, shape.split("x")))
  options = OPTIONS.get(generation, {}) | ({"num_slices": slices} if slices > 1 else {})
  try:
    devices = topologies.get_topology_desc(name, "tpu", **options).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    raise ValueError(
      f"--topology={requested} is refused by libtpu ({reason}): give one or more of {_known()}"
    ) from error
  chip = hardware.chip_of(devices[0].device_kind)
  if chip is None or len(devices) != chips:
    raise ValueError(
      f"--topology={requested} gives {len(devices)} devices of {devices[0].device_kind!r}, expected {chips} of a kind "
      "that hardware.py lists: try another version of libtpu"
    )
  if slices > 1 and chip.dcn_bandwidth is None:
    stated = ", ".join(one.name for one in hardware.CHIPS.values() if one.dcn_bandwidth)
    raise ValueError(
      f"--topology={requested}: Google does not state how fast the network between slices of a {chip.name} is, only of "
      f"{stated}: plan for one slice"
    )
  products = {shape: f"{generation}-{number}" for number, shape in SLICES[generation].items()}
  times = f"{slices}x" if slices > 1 else ""
  return Topology(times + name, times + products.get(shape, name), tuple(devices), chip, slices)


def _known() -> str:
  largest = {name: list(slices.values())[-1] for name, slices in SLICES.items()}
  known = (f"{name}-{{{','.join(map(str, SLICES[name]))}}}, {name}:{largest[name]} and such" for name in SLICES)
  return f"{'; '.join(known)}; 2xv5e-256 for two of them"
