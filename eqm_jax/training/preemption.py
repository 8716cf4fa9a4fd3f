"""Preemption: SIGTERM, which a preempted machine also gets, asks a run to save and end."""

import signal
import threading

import jax
import orbax.checkpoint as ocp

from eqm_jax.checkpoints import manager as checkpoint_manager


class Preemption:
  """A context inside which SIGTERM does not end the process; the run asks for it after every step.

  Of several processes a single one may get the signal, or each at another time. From `distributed.initialized` on,
  JAX's coordination service receives it in place of Python and has all of them stop after the same step, which
  requires that every process asks after every step.
  """

  def __init__(self, checkpoints: ocp.CheckpointManager):
    self._checkpoints, self._received = checkpoints, threading.Event()
    self._is_distributed = jax.distributed.is_initialized()
    # Python lets no other thread handle signals, such as one that a notebook trains in.
    self._handles = not self._is_distributed and threading.current_thread() is threading.main_thread()

  def requested(self, step: int) -> bool:
    """Whether the run should save this step and end."""
    if self._is_distributed:
      return checkpoint_manager.preempted(self._checkpoints, step)
    return self._received.is_set()

  def __enter__(self) -> "Preemption":
    if self._handles:
      self._previous = signal.signal(signal.SIGTERM, lambda *_: self._received.set())
    return self

  def __exit__(self, error_type, error, traceback):
    if self._handles:
      signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)  # None: not set by Python
    elif self._is_distributed and error is None:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what follows training has nothing to save
