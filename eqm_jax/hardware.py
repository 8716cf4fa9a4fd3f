"""What accelerators can do, by the name that JAX gives them: peak rates, memory, links.

TPUs: the pages of Cloud TPU's documentation on each version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). Google
states the links of a chip together; v5e's and v6e's are stated for both directions, and halved here. What a program
may use of a TPU's memory is what the compiler of libtpu 0.0.52 says when it is asked for more (of a v5p 95.73 GiB, more
than Google states). GPUs: NVIDIA's data sheets, dense bfloat16; of their memory JAX takes three quarters.
"""

import dataclasses
import os
import platform
import sys


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of a mesh."""

  name: str
  flops: float  # per second, bfloat16 matrix products
  memory: float  # bytes
  memory_bandwidth: float  # bytes per second
  link_bandwidth: float  # bytes per second out of a chip, all its links to other chips together
  usable_memory: float  # bytes, of `memory`, that the arguments, results and temporaries of a program may take


CHIPS = {  # by jax.Device.device_kind
  "TPU v4": Chip("TPU v4", 275e12, 32 * 2**30, 1228e9, 300e9, 30.75 * 2**30),
  "TPU v5 lite": Chip("TPU v5e", 197e12, 16 * 2**30, 819e9, 200e9, 15.75 * 2**30),
  "TPU v5": Chip("TPU v5p", 459e12, 95 * 2**30, 2765e9, 600e9, 95 * 2**30),
  "TPU v6 lite": Chip("TPU v6e", 918e12, 32 * 2**30, 1638e9, 400e9, 31.24 * 2**30),
  "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 312e12, 40e9, 1555e9, 300e9, 0.75 * 40e9),
  "NVIDIA A100-SXM4-80GB": Chip("A100 80GB", 312e12, 80e9, 2039e9, 300e9, 0.75 * 80e9),
  "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3350e9, 450e9, 0.75 * 80e9),
  "NVIDIA H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9, 0.75 * 141e9),
}


def chip_of(device_kind: str) -> Chip | None:
  """The entry of a device, or None: of CPUs nobody states such a number."""
  return CHIPS.get(device_kind)


HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


def restart_with_huge_pages():
  """Starts this Python program again, once, so that its large arrays lie in huge pages of memory.

  XLA's CPU backend allocates its temporaries anew in every step; with pages of 4 KiB a training step of a 33 M
  parameter network spends a sixth of its time on page faults. The C library reads the setting when a process starts,
  hence the restart, which keeps the process id and takes a few hundredths of a second. Nothing happens where it is
  set already (GLIBC_TUNABLES), where the kernel does not leave the choice to programs, or without glibc.
  """
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  if "glibc.malloc.hugetlb" in tunables or platform.libc_ver()[0] != "glibc" or not os.path.exists(HUGE_PAGES):
    return
  with open(HUGE_PAGES, encoding="ascii") as file:
    if "[madvise]" not in file.read():
      return
  os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
