import builtins
import io

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
def test_the_processor_is_told_from_others(monkeypatch, text, expected):
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
