"""How a run is told to save and end: SIGTERM, which is also what a preempted machine gets."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import orbax.checkpoint as ocp

from eqm_jax.training import checkpoint


@contextlib.contextmanager
def told_to_stop(manager: ocp.CheckpointManager) -> Iterator[Callable[[int], bool]]:
  """Gives a function step → whether the run is to save this step and end.

  Of several processes one alone may get the signal, or each at another time. JAX's coordination service then hears it
  in place of Python, from `devices.joined` on, and has all of them stop after the same step; every process must ask
  after every step.
  """
  if jax.distributed.is_initialized():
    yield lambda step: checkpoint.preempted(manager, step)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what comes after training has nothing to save, and just ends
    return
  stopped = threading.Event()
  previous = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
  try:
    yield lambda step: stopped.is_set()
  finally:
    signal.signal(signal.SIGTERM, previous)
