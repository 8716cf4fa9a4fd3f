import builtins
import io
import os

import pytest

from eqm_jax import hardware

X86 = """processor	: 0
vendor_id	: AuthenticAMD
cpu family	: 25
model		: 1
model name	: AMD EPYC
stepping	: 1
flags		: fpu avx avx2 fma
power management:

processor	: 1
vendor_id	: Another
"""
ARM = """processor	: 0
BogoMIPS	: 50.00
Features	: fp asimd
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
"""


@pytest.mark.parametrize(
  "text, expected",
  [
    (X86, hardware.Processor("AMD EPYC", "AuthenticAMD 25 1 1", ("AVX2", "FMA"))),
    (ARM, hardware.Processor("machine", "0x41 0x3 0xd0c", ("NEON",))),
    (None, hardware.Processor("machine", "", ())),
  ],
)
def test_processors_of_different_generations_differ(monkeypatch, text, expected):
  def opened(*_, **__):
    if text is None:
      raise FileNotFoundError
    return io.StringIO(text)

  monkeypatch.setattr(builtins, "open", opened)
  monkeypatch.setattr(hardware.platform, "machine", lambda: "machine")
  monkeypatch.setattr(hardware.platform, "processor", lambda: "")
  assert hardware.processor() == expected


def test_threads_are_one_for_each_core_or_as_the_environment_says(monkeypatch):
  monkeypatch.setattr(hardware, "cores", lambda: 4)
  monkeypatch.setenv("PJRT_NPROC", "many")  # no number, and passed over as jaxlib does
  monkeypatch.delenv("NPROC", raising=False)
  assert hardware.xla_cpu_threads(1) == 4 and hardware.xla_cpu_threads(8) == 8
  monkeypatch.setenv("NPROC", "2")
  assert hardware.xla_cpu_threads(1) == 2 and hardware.xla_cpu_threads(8) == 8
  monkeypatch.setenv("PJRT_NPROC", "3")
  assert hardware.xla_cpu_threads(1) == 3


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A machine with libtpu, no accelerator, and a network device of Google's."""
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: name == "libtpu")
  monkeypatch.setattr(hardware, "DEVICES", str(tmp_path / "dev"))
  monkeypatch.setattr(hardware, "PCI_DEVICES", str(tmp_path / "pci"))
  (tmp_path / "dev" / "vfio").mkdir(parents=True)
  (tmp_path / "dev" / "vfio" / "vfio").touch()
  (tmp_path / "pci" / "0").mkdir(parents=True)
  (tmp_path / "pci" / "0" / "vendor").write_text("0x1ae0\n")
  (tmp_path / "pci" / "0" / "class").write_text("0x020000\n")
  return tmp_path


def test_without_an_accelerator_libtpu_is_not_asked_for_one(machine):
  hardware.use_cpu_without_accelerator()
  assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("device", ["dev/accel0", "dev/vfio/0", "dev/nvidia0", "dev/kfd", "pci/0/class"])
def test_an_accelerator_is_left_to_jax(machine, device):
  (machine / device).write_text("0x120000")  # of a PCI device: one that computes, whose driver may be missing
  hardware.use_cpu_without_accelerator()
  assert "JAX_PLATFORMS" not in os.environ


def test_jax_chooses_where_libtpu_is_missing_or_the_platform_is_set(machine, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
  hardware.use_cpu_without_accelerator()
  assert os.environ["JAX_PLATFORMS"] == "tpu,cpu"
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
  hardware.use_cpu_without_accelerator()
  assert "JAX_PLATFORMS" not in os.environ
