"""Peak rates, memory and links of accelerators, by the name that JAX gives them; and the processor of this machine.

TPUs: Cloud TPU's documentation of each version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). Google states the
links of a chip together; v5e's and v6e's are stated for both directions, and halved here. The usable part of a TPU's
memory is from the error of libtpu 0.0.52's compiler for larger programs (for a v5p 95.73 GiB, more than Google states).
Between slices: the network of the data center of a v5e and v6e pod of 256 chips, 6.4 and 25.6 Tbit/s, by chip; of the
others it is not stated.
GPUs: NVIDIA's data sheets, dense bfloat16; JAX takes three quarters of their memory.
"""

import dataclasses
import importlib.util
import os
import pathlib
import platform
import re


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of a mesh."""

  name: str
  flops: float  # per second, bfloat16 matrix products
  memory: float  # bytes
  memory_bandwidth: float  # bytes per second
  link_bandwidth: float  # bytes per second out of a chip, all its links together
  usable_memory: float  # bytes for the arguments, results and temporaries of a program
  dcn_bandwidth: float | None = None  # bytes per second out of a chip to other slices; None: not stated


CHIPS = {  # by jax.Device.device_kind
  "TPU v4": Chip("TPU v4", 275e12, 32 * 2**30, 1228e9, 300e9, 30.75 * 2**30),
  "TPU v5 lite": Chip("TPU v5e", 197e12, 16 * 2**30, 819e9, 200e9, 15.75 * 2**30, 6.4e12 / 8 / 256),
  "TPU v5": Chip("TPU v5p", 459e12, 95 * 2**30, 2765e9, 600e9, 95 * 2**30),
  "TPU v6 lite": Chip("TPU v6e", 918e12, 32 * 2**30, 1638e9, 400e9, 31.24 * 2**30, 25.6e12 / 8 / 256),
  "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 312e12, 40e9, 1555e9, 300e9, 0.75 * 40e9),
  "NVIDIA A100-SXM4-80GB": Chip("A100 80GB", 312e12, 80e9, 2039e9, 300e9, 0.75 * 80e9),
  "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3350e9, 450e9, 0.75 * 80e9),
  "NVIDIA H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9, 0.75 * 141e9),
  "NVIDIA B200": Chip("B200", 2250e12, 180e9, 8000e9, 900e9, 0.75 * 180e9),
}


def chip_of(device_kind: str) -> Chip | None:
  """The entry of a device, or None for kinds that are not listed, such as CPUs."""
  return CHIPS.get(device_kind)


# Instruction sets for matrix products on CPUs, by their flags in /proc/cpuinfo.
INSTRUCTION_SETS = {
  "avx2": "AVX2",
  "fma": "FMA",
  "avx512f": "AVX-512",
  "avx512_bf16": "AVX-512 bfloat16",
  "amx_tile": "AMX",
  "amx_bf16": "AMX bfloat16",
  "asimd": "NEON",
  "sve": "SVE",
}
# Lines of /proc/cpuinfo with the generation: many virtual machines give all processors of a maker one name.
GENERATION = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU variant", "CPU part")


@dataclasses.dataclass(frozen=True)
class Processor:
  """The CPU of this machine."""

  name: str
  generation: str  # maker and numbers; "": unknown
  instruction_sets: tuple[str, ...]  # values of INSTRUCTION_SETS

  def __str__(self) -> str:
    return ", ".join(part for part in (self.name, self.generation, *self.instruction_sets) if part)


def processor() -> Processor:
  """The CPU by /proc/cpuinfo; elsewhere only its name, by Python's `platform`."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      first = file.read().split("\n\n")[0]  # all processors are of one kind
  except OSError:
    return Processor(platform.processor() or platform.machine(), "", ())
  lines = dict(re.findall(r"^([^:\n]*\S)\s*:[ \t]*(.+)$", first, re.MULTILINE))
  flags = (lines.get("flags") or lines.get("Features") or "").split()
  return Processor(
    name=lines.get("model name") or platform.machine(),
    generation=" ".join(lines[key] for key in GENERATION if key in lines),
    instruction_sets=tuple(name for flag, name in INSTRUCTION_SETS.items() if flag in flags),
  )


def cores() -> int:
  """Number of CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def xla_cpu_threads(devices: int) -> int:
  """Number of threads over which XLA splits a product on a CPU, which sets the order of its sums.

  All devices of a process share them: one for each core, or as many as the environment sets (jaxlib reads two names, in
  this order), but at least one for each of the `devices` that --xla_force_host_platform_device_count makes of the CPU.
  """
  for name in ("PJRT_NPROC", "NPROC"):
    try:
      return max(int(os.environ.get(name, "")), devices)
    except ValueError:  # not set, or not a number
      continue
  return max(cores(), devices)


DEVICE_FILES = ("accel*", "vfio/[0-9]*", "nvidia*", "kfd", "dxg")  # TPUs, NVIDIA's and AMD's GPUs, GPUs of WSL
DEVICES, PCI_DEVICES = "/dev", "/sys/bus/pci/devices"


def use_cpu_without_accelerator():
  """Has JAX take the CPU where libtpu is installed, to make plans, and the machine has neither a TPU nor a GPU.

  Otherwise every process that uses JAX looks for a TPU through libtpu, which complains in five lines that there is
  none. To be called before JAX is imported. A JAX_PLATFORMS that is set stays.
  """
  if not os.environ.get("JAX_PLATFORMS") and importlib.util.find_spec("libtpu") and not _may_have_accelerator():
    os.environ["JAX_PLATFORMS"] = "cpu"


def _may_have_accelerator() -> bool:
  """Whether there is a TPU or GPU, or hardware of Google's whose driver is missing, of which JAX should complain."""
  if any(any(pathlib.Path(DEVICES).glob(pattern)) for pattern in DEVICE_FILES):
    return True
  for device in pathlib.Path(PCI_DEVICES).glob("*"):
    vendor, kind = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
    if vendor == "0x1ae0" and not kind.startswith(("0x01", "0x02")):  # disks and networks of its virtual machines
      return True
  return False
