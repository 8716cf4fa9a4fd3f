import errno
import fcntl
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from eqm_jax import io

HOLDS = """
import sys, time
from eqm_jax import io
with io.workdir_lock(sys.argv[1]):
  print("locked", flush=True)
  time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_a_killed_process(tmp_path):
  process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "locked\n"
  with pytest.raises(ValueError, match=rf"another run is at work here \(process {process.pid} on .*another --workdir"):
    with io.workdir_lock(str(tmp_path)):
      pass
  process.kill()
  process.wait()
  with io.workdir_lock(str(tmp_path)):
    pass
  with io.workdir_lock(str(tmp_path)):  # it is released at the end of the block, too
    pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog, code):
  def flock(*_):
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(fcntl, "flock", flock)
  with io.workdir_lock(str(tmp_path)):
    assert f"no locks ({os.strerror(code)}): make sure that no other run writes there" in caplog.text
  assert os.listdir(tmp_path) == [io.LOCK]


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
  path = str(tmp_path / "a.json")
  io.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    io.write_json(path, {"a": object()})
  assert io.read_json(path) == {"a": 1}


# As on Windows.
WITHOUT = """
import sys
sys.modules |= {"fcntl": None, "resource": None}
import logging, os
logging.basicConfig(format="%(message)s")
from eqm_jax import hardware, io
del os.sched_getaffinity, os.pwrite, os.ftruncate
io.allow_open_files(10**9)
with io.workdir_lock(sys.argv[1]), io.workdir_lock(sys.argv[1]):
  io.write_json(sys.argv[1] + "/a.json", hardware.cores())
"""


def test_without_flock_the_workdir_is_not_locked_and_that_is_said(tmp_path):
  command = [sys.executable, "-W", "ignore", "-c", WITHOUT, str(tmp_path)]
  finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  line = f"{tmp_path}: not locked, this system has no flock: make sure that no other run writes there"
  assert finished.stderr.splitlines() == [line, line] and io.read_json(str(tmp_path / "a.json")) >= 1


def test_a_directory_that_cannot_be_written_is_refused_and_none_is_made(tmp_path, monkeypatch):
  io.check_writable(str(tmp_path / "a" / "b"), "")
  assert not os.listdir(tmp_path)
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="file/run: cannot be written: choose another"):
    io.check_writable(str(tmp_path / "file" / "run"), "choose another")
  monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
  with pytest.raises(ValueError, match="cannot be written"):
    io.check_writable(str(tmp_path / "a" / "b"), "")
