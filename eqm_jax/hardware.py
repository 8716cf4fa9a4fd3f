"""What accelerators can do, by the name that JAX gives them: peak rates, memory, links.

TPUs: the pages of Cloud TPU's documentation on each version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). Google
states the links of a chip together; v5e's and v6e's are stated for both directions, and halved here. GPUs: NVIDIA's
data sheets, dense bfloat16.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of a mesh."""

  name: str
  flops: float  # per second, bfloat16 matrix products
  memory: float  # bytes
  memory_bandwidth: float  # bytes per second
  link_bandwidth: float  # bytes per second out of a chip, all its links to other chips together


CHIPS = {  # by jax.Device.device_kind
  "TPU v4": Chip("TPU v4", 275e12, 32 * 2**30, 1228e9, 300e9),
  "TPU v5 lite": Chip("TPU v5e", 197e12, 16 * 2**30, 819e9, 200e9),
  "TPU v5": Chip("TPU v5p", 459e12, 95 * 2**30, 2765e9, 600e9),
  "TPU v6 lite": Chip("TPU v6e", 918e12, 32 * 2**30, 1638e9, 400e9),
  "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 312e12, 40e9, 1555e9, 300e9),
  "NVIDIA A100-SXM4-80GB": Chip("A100 80GB", 312e12, 80e9, 2039e9, 300e9),
  "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3350e9, 450e9),
  "NVIDIA H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9),
}


def chip_of(device_kind: str) -> Chip | None:
  """The entry of a device, or None: of CPUs nobody states such a number."""
  return CHIPS.get(device_kind)
