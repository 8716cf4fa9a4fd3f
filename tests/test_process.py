"""How the process of the command line starts and ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from eqm_jax import process


@pytest.fixture
def restarted(monkeypatch, tmp_path) -> list:
  """The commands with which the process would have started again; the kernel and the C library are a usual Linux's."""
  commands = []
  monkeypatch.delitem(sys.modules, "IPython", raising=False)  # which another test may have imported
  monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
  monkeypatch.setattr(process.platform, "libc_ver", lambda: ("glibc", "2.36"))
  monkeypatch.setattr(process, "HUGE_PAGES", str(tmp_path / "enabled"))
  (tmp_path / "enabled").write_text("always [madvise] never\n")
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "eqm_jax.main", "--config=a b.py"])
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
  return commands


def test_a_program_starts_again_once_with_huge_pages(restarted):
  process.restart_with_huge_pages()
  assert restarted == [[sys.executable, "-m", "eqm_jax.main", "--config=a b.py"]]
  assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
  process.restart_with_huge_pages()
  assert len(restarted) == 1


@pytest.mark.parametrize("kernel", ["[always] madvise never", "always madvise [never]", None])
def test_where_huge_pages_are_no_choice_nothing_restarts(restarted, tmp_path, kernel):
  (tmp_path / "enabled").unlink()
  if kernel:
    (tmp_path / "enabled").write_text(kernel)
  process.restart_with_huge_pages()
  assert not restarted


def test_without_glibc_nothing_restarts(restarted, monkeypatch):
  monkeypatch.setattr(process.platform, "libc_ver", lambda: ("", ""))
  process.restart_with_huge_pages()
  assert not restarted


def test_in_a_notebook_nothing_restarts(restarted, monkeypatch):
  monkeypatch.setitem(sys.modules, "IPython", None)
  process.restart_with_huge_pages()
  assert not restarted


# Ends by the exception that the first argument makes, while a thread that nobody can stop is at work.
ENDS = """
import sys, threading, time
from eqm_jax import process
threading.Thread(target=time.sleep, args=(3600,)).start()
try:
  raise eval(sys.argv[1])
except BaseException as error:
  process.end_process(error)
"""


@pytest.mark.parametrize(
  "error, status, text",
  [
    ("SystemExit()", 0, ""),
    ("SystemExit(7)", 7, ""),
    ("SystemExit('error: a mistake')", 1, "error: a mistake\n"),
    ("KeyError('mine')", 1, "KeyError: 'mine'\n"),
    ("KeyboardInterrupt()", -signal.SIGINT, "interrupted\n"),
  ],
)
def test_no_thread_delays_the_end(error, status, text):
  command = [sys.executable, "-c", ENDS, error]
  finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert finished.returncode == status and finished.stderr.endswith(text), finished.stderr


# Python's own handling of the signal comes to nothing, as it does during a compilation.
WORKS = """
import signal, time
from eqm_jax import process
signal.signal(signal.SIGINT, lambda *_: None)
process.end_on_second_interrupt()
print("works", flush=True)
time.sleep(3600)
"""


def test_a_second_interrupt_ends_at_once():
  with subprocess.Popen([sys.executable, "-c", WORKS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as working:
    assert working.stdout.readline() == "works\n"
    working.send_signal(signal.SIGINT)
    time.sleep(2 * process.SAME_INTERRUPT)
    assert working.poll() is None
    working.send_signal(signal.SIGINT)
    try:
      assert working.wait(30) == 130
    finally:
      working.kill()
