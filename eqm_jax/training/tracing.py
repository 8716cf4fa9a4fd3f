"""A trace of some training steps, for the profilers of TensorBoard, XProf and Perfetto."""

import logging
import os
import sys
from typing import Any

import jax

DIRECTORY = "profile"  # in the workdir

log = logging.getLogger(__name__)


class Trace:
  """Records from the beginning of one step to the end of another, on the first process."""

  def __init__(self, steps: tuple[int, int], workdir: str):
    """`steps` are the first and last, (0, 0) is none.

    Raises:
      ValueError: if they are no such pair.
    """
    if len(steps) != 2 or not (steps[0] == steps[1] == 0 or 1 <= steps[0] <= steps[1]):
      raise ValueError(f"train.profile = {tuple(steps)} must be a first and a last step, or (0, 0) for none")
    if steps[0] and jax.default_backend() == "cpu" and "libtpu" in sys.modules:
      raise ValueError(
        f"train.profile = {tuple(steps)}: libtpu's profiler crashes without a TPU; set JAX_PLATFORMS=cpu"
      )
    self._first, self._last = steps if jax.process_index() == 0 else (0, 0)
    self._directory, self._active = os.path.join(workdir, DIRECTORY), False

  def before(self, step: int):
    """To be called before a step is started."""
    if step == self._first:
      jax.profiler.start_trace(self._directory)
      self._active = True

  def after(self, step: int, result: Any):
    """To be called after it, with arrays that are there when it is done."""
    if self._active and step >= self._last:
      jax.block_until_ready(result)
      self.close()
      log.info("trace of steps %d to %d: %s", self._first, step, self._directory)

  def close(self):
    """Ends a trace that the run did not reach the end of."""
    if self._active:
      jax.profiler.stop_trace()
      self._active = False
