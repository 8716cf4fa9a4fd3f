"""How a process starts: alone, with others, or told whom it waits for."""

import contextlib
import os
import signal
import time

import jax
import pytest
from conftest import start_python

from eqm_jax import distributed, launchers

NOBODY = (None, None, None)


@pytest.fixture
def initialize(monkeypatch):
  """Sets what stands for `jax.distributed.initialize`, in a process that knows of no launcher."""
  monkeypatch.setattr(launchers, "alone", lambda: None)
  monkeypatch.setattr(launchers, "variables", dict)
  monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
  jax.devices()

  def install(function):
    monkeypatch.setattr(jax.distributed, "initialize", function)

  return install


def raising(error: BaseException):
  def initialize(*_, **__):
    raise error

  return initialize


@pytest.mark.parametrize(
  "arguments, reason, logged",
  [((None, 1, None), None, ""), (("localhost:1", 1, 0), None, ""), (NOBODY, "", ""), (NOBODY, "a step", "a step")],
)
def test_one_process_looks_for_no_others(initialize, monkeypatch, caplog, arguments, reason, logged):
  initialize(raising(AssertionError))
  monkeypatch.setattr(launchers, "alone", lambda: reason)
  caplog.set_level("INFO")
  with distributed.initialized(*arguments):
    assert distributed.process_index_and_count() == (0, 1)
  assert [record.message for record in caplog.records] == ([f"this process runs alone: {logged}"] if logged else [])


def test_where_jax_is_up_it_stays_as_it_is(monkeypatch):
  monkeypatch.setattr(launchers, "alone", lambda: None)
  jax.devices()
  with distributed.initialized(*NOBODY):
    pass
  with pytest.raises(ValueError, match="has used JAX without the others"), distributed.initialized("localhost:1", 2, 0):
    pass


def test_what_the_caller_has_joined_is_not_joined_again(initialize, monkeypatch):
  initialize(raising(AssertionError))
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax.distributed, "shutdown", raising(AssertionError))
  with distributed.initialized("localhost:1", 2, 0):
    pass


def test_others_that_are_not_found_are_refused_with_the_way_to_go_alone(initialize, monkeypatch):
  monkeypatch.setattr(launchers, "variables", lambda: {"JOB_COMPLETION_INDEX": "0"})
  initialize(raising(RuntimeError("Kubernetes API Error: 403 - Forbidden\nIt appears that")))
  text = r"not found \(JOB_COMPLETION_INDEX=0\): Kubernetes API Error: 403 - Forbidden\. .*--num_processes=1"
  with pytest.raises(ValueError, match=text), distributed.initialized(*NOBODY):
    pass


def test_a_tpu_without_metadata_runs_alone(initialize, caplog):
  initialize(raising(ConnectionError("Failed to resolve metadata.google.internal")))
  with distributed.initialized(*NOBODY):
    pass
  assert "runs alone: the metadata of the TPU cannot be reached (Failed to resolve" in caplog.text


def test_waiting_is_told_and_ends(initialize, monkeypatch, caplog):
  monkeypatch.setattr(launchers, "variables", lambda: {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
  monkeypatch.setattr(distributed, "NOTICE_SECONDS", 0.02)
  monkeypatch.setattr(distributed, "WAIT_SECONDS", 0.05)
  statuses = []
  monkeypatch.setattr(os, "_exit", statuses.append)
  handler = signal.getsignal(signal.SIGINT)

  def wait(*_, **__):
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # JAX reacts to nothing else
    while not statuses:
      time.sleep(0.01)

  initialize(wait)
  with distributed.initialized(*NOBODY):
    pass
  first, second = (record.message for record in caplog.records)
  assert first.startswith("waiting for the other processes of the run (SLURM_NTASKS=4, SLURM_PROCID=0)")
  assert second.startswith("error: the other processes of the run (SLURM_NTASKS=4, SLURM_PROCID=0) did not come")
  assert statuses == [1] and "--num_processes=1" in first and "--num_processes=1" in second
  assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'cuda'"), AssertionError()])
def test_absent_devices_are_refused_in_one_line(monkeypatch, error):
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  monkeypatch.setattr(jax, "devices", raising(error))
  with pytest.raises(ValueError, match="JAX_PLATFORMS=cuda: JAX finds no such device .* Set another, or unset it"):
    distributed.check_devices()


# Waits for three other tasks that never come.
WAITS = """
import logging
from eqm_jax import distributed
logging.basicConfig(level=logging.INFO)
distributed.NOTICE_SECONDS = 0
with distributed.initialized(None, None, None):
  pass
"""


@pytest.mark.slow
def test_a_process_that_waits_can_be_interrupted():
  step = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
  (process,) = start_python("-c", WAITS, **step, SLURM_NTASKS="4")
  for line in process.stderr:
    if "waiting for" in line:
      break
  time.sleep(1)  # until it waits for them in JAX
  with contextlib.suppress(ProcessLookupError):
    process.send_signal(signal.SIGINT)
  assert process.wait(60) == -signal.SIGINT
