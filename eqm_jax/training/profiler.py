"""A trace of some training steps, for the profilers of TensorBoard, XProf and Perfetto."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence

import jax

DIRECTORY = "profile"  # in the workdir

log = logging.getLogger(__name__)


class Profiler:
  """Traces from the beginning of one step to the end of another, on the first process."""

  def __init__(self, steps: Sequence[int] | None, workdir: str):
    """`steps` are the first and last step; None traces nothing.

    Raises:
      ValueError: if they are no such pair, or the profiler would crash here.
    """
    self._directory, self._active, self._steps = os.path.join(workdir, DIRECTORY), False, None
    if steps is None:
      return
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
      raise ValueError(f"train.profile = {tuple(steps)} must be a first and a last step, or None for no trace")
    looks_for_tpus = "libtpu" in sys.modules and jax.config.jax_platforms != "cpu"
    if looks_for_tpus and jax.default_backend() == "cpu":
      raise ValueError(
        f"train.profile = {tuple(steps)}: libtpu's profiler crashes without a TPU; set JAX_PLATFORMS=cpu"
      )
    self._steps = tuple(steps) if jax.process_index() == 0 else None

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Starts the trace before its first step is dispatched, and ends it when the last one is done."""
    if self._steps and step == self._steps[0]:
      jax.profiler.start_trace(self._directory)
      self._active = True
    yield
    if self._active and step >= self._steps[1]:
      jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])
      self.close()
      log.info("trace of steps %d to %d: %s", self._steps[0], step, self._directory)

  def close(self):
    """Ends a trace whose last step the run did not reach."""
    if self._active:
      jax.profiler.stop_trace()
      self._active = False
