"""What a training leaves behind: no threads, no files, and the exit status of what ended it."""

import os
import signal
import threading
import time

import pytest
from conftest import run_python

from eqm_jax.training import train


def left() -> tuple[int, int]:
  """Threads and open files of this process."""
  return threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def settled(limit: tuple[int, int]) -> bool:
  """Whether no more is left than `limit`, once threads have ended that were told to."""
  end = time.monotonic() + 30
  while not all(count <= most for count, most in zip(left(), limit)) and time.monotonic() < end:
    time.sleep(0.01)
  return all(count <= most for count, most in zip(left(), limit))


@pytest.fixture
def config(tiny_config):
  tiny_config.train.update(steps=2, log_every=1)
  tiny_config.checkpoint.every = 1
  tiny_config.optimizer.warmup_steps = 1
  return tiny_config


@pytest.mark.slow
def test_trainings_leave_no_threads_and_files(config, tmp_path, monkeypatch):
  train.train(config, str(tmp_path / "first"))  # what libraries open once
  before = left()
  for name in ("second", "third"):
    train.train(config, str(tmp_path / name))
  assert settled(before), threading.enumerate()

  def make_step(*_, **__):
    def step(*_):
      raise KeyboardInterrupt if len(errors) == 1 else KeyError("mine")

    return step

  monkeypatch.setattr(train.step_lib, "make_step", make_step)
  errors = []  # kept, and with them what the frames of the trainings hold, as a notebook does
  for name in ("fourth", "fifth"):
    try:
      train.train(config, str(tmp_path / name))
    except (KeyError, KeyboardInterrupt) as error:
      errors.append(error)
  assert len(errors) == 2 and settled(before), threading.enumerate()


# Trains by the command line; what the first argument names happens in the fourth step.
RUNS = """
import os, runpy, signal, sys
what = sys.argv.pop(1)
from eqm_jax.data import sources
from eqm_jax.training import train
make_step, open_source, calls = train.step_lib.make_step, sources.open_source, []

def made(*arguments, **options):
  step = make_step(*arguments, **options)
  def wrapped(*arguments):
    calls.append(what)
    if len(calls) == 4 and what == "exception":
      raise KeyError("mine")
    if len(calls) == 4 and what in ("SIGINT", "SIGTERM"):
      os.kill(os.getpid(), getattr(signal, what))
    state, metrics = step(*arguments)
    return state, metrics | ({"loss": metrics["loss"] * float("nan")} if what == "loss" and len(calls) == 4 else {})
  return wrapped

class Damaged:
  def __init__(self, source):
    self._source = source
  def __getattr__(self, name):
    return getattr(self._source, name)
  def __len__(self):
    return len(self._source)
  def __getitem__(self, index):
    if len(calls) > 2:
      raise ValueError("sample.png is damaged")
    return self._source[index]

train.step_lib.make_step = made
if what == "image":
  sources.open_source = lambda *arguments: Damaged(open_source(*arguments))
runpy.run_module("eqm_jax.main", run_name="__main__", alter_sys=True)
"""


SMALL = {
  "model.width": 16, "model.depth": 1, "model.num_heads": 2, "train.steps": 100000, "train.batch_size": 8,
  "checkpoint.every": 2, "evaluation.num_samples": None,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
  "what, status, text",
  [
    ("exception", 1, "KeyError: 'mine'\n"),
    ("loss", 1, "The newest checkpoint is that of step 2\n"),
    ("image", 1, "error: sample.png is damaged\n"),
    ("SIGINT", -signal.SIGINT, "interrupted\n"),
    ("SIGTERM", 0, "SIGTERM: saved step 4\n"),
  ],
)
def test_whatever_ends_a_run_ends_its_process(tmp_path, what, status, text):
  flags = {"config": "digits:smoke", "workdir": tmp_path / "run"}
  flags |= {f"config.{name}": value for name, value in SMALL.items()}
  words = [f"--{name}={value}" for name, value in flags.items()]
  finished = run_python("-c", RUNS, what, *words, status=status, timeout=120, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
  assert finished.stderr.endswith(text), finished.stderr
  assert os.listdir(tmp_path / "run" / "checkpoints")
