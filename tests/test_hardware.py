import builtins
import io
import os
import sys

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
def restarted(monkeypatch, tmp_path) -> list:
  """The commands with which the process would have started again; the kernel and the C library are a usual Linux's."""
  commands = []
  monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
  monkeypatch.setattr(hardware.platform, "libc_ver", lambda: ("glibc", "2.36"))
  monkeypatch.setattr(hardware, "HUGE_PAGES", str(tmp_path / "enabled"))
  (tmp_path / "enabled").write_text("always [madvise] never\n")
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "eqm_jax.main", "--config=a b.py"])
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
  return commands


def test_a_program_starts_again_once_with_huge_pages(restarted):
  hardware.restart_with_huge_pages()
  assert restarted == [[sys.executable, "-m", "eqm_jax.main", "--config=a b.py"]]
  assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
  hardware.restart_with_huge_pages()
  assert len(restarted) == 1


@pytest.mark.parametrize("kernel", ["[always] madvise never", "always madvise [never]", None])
def test_where_huge_pages_are_no_choice_nothing_restarts(restarted, tmp_path, kernel):
  (tmp_path / "enabled").unlink()
  if kernel:
    (tmp_path / "enabled").write_text(kernel)
  hardware.restart_with_huge_pages()
  assert not restarted


def test_without_glibc_nothing_restarts(restarted, monkeypatch):
  monkeypatch.setattr(hardware.platform, "libc_ver", lambda: ("", ""))
  hardware.restart_with_huge_pages()
  assert not restarted
