"""What a run tells while it trains: metrics.jsonl, TensorBoard, one line of text; the first process does."""

import contextlib
import datetime
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import tensorboardX

from eqm_jax import devices, hardware
from eqm_jax.files import whole

log = logging.getLogger(__name__)


class MetricWriter:
  """Writes scalars. A resumed run drops what the killed one wrote past its checkpoint."""

  def __init__(self, workdir: str, *, first_step: int, last_step: int, batch_size: int, flops_per_example: int):
    """`batch_size` is the global one; `flops_per_example` what the model takes, forward and back."""
    self._writes = devices.process()[0] == 0
    if self._writes:
      self._path = os.path.join(workdir, "metrics.jsonl")
      self._keep_up_to(first_step)
      self._file = open(self._path, "a", encoding="utf-8")
      self._board = tensorboardX.SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=first_step + 1)
    self._last_step, self._batch_size, self._flops = last_step, batch_size, flops_per_example
    self._step, self._time, self._waited = None, None, 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time inside as time that the run waits for its data."""
    begin = time.monotonic()
    yield
    self._waited += time.monotonic() - begin

  @contextlib.contextmanager
  def apart(self) -> Iterator[None]:
    """Leaves the time inside out of the rates: it is not spent on training."""
    begin = time.monotonic()
    yield
    if self._time is not None:
      self._time += time.monotonic() - begin

  def write_scores(self, step: int, scores: Mapping[str, float]):
    """Writes what an evaluation of a step found, maybe some steps later."""
    self._record(step, scores)
    log.info("scores of step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))

  def write(self, step: int, scalars: Mapping[str, float]):
    """Writes the metrics of one step.

    Since the last call: examples_per_second, of all devices and of each; the share data_wait; mfu, the share of the
    devices' peak rate that the model's own arithmetic takes. device_gib: the most memory that one of this process's
    devices has held so far. What the device does not tell is left out.
    """
    now = time.monotonic()
    scalars, progress = dict(scalars), ""
    if self._step is not None:  # the first interval would count compilation
      rate = (step - self._step) / (now - self._time)
      left = datetime.timedelta(seconds=round((self._last_step - step) / rate))
      scalars["examples_per_second"] = rate * self._batch_size
      scalars["examples_per_second_per_device"] = rate * self._batch_size / jax.device_count()
      scalars["data_wait"] = self._waited / (now - self._time)
      if chip := hardware.chip_of(jax.devices()[0].device_kind):
        scalars["mfu"] = scalars["examples_per_second_per_device"] * self._flops / chip.flops
      if peaks := [found["peak_bytes_in_use"] for found in _memory() if "peak_bytes_in_use" in found]:
        scalars["device_gib"] = max(peaks) / 2**30
      progress = f"  {left} left"
    self._step, self._time, self._waited = step, now, 0.0
    self._record(step, scalars)
    text = "  ".join(f"{name} {value:.5g}" for name, value in scalars.items())
    log.info("step %d/%d  %s%s", step, self._last_step, text, progress)

  def _record(self, step: int, scalars: Mapping[str, float]):
    if not self._writes:
      return
    # JSON has no word for what is not finite, the loss of a batch that was left out.
    record = {"step": step} | {name: value if np.isfinite(value) else None for name, value in scalars.items()}
    try:
      self._file.write(json.dumps(record) + "\n")
      self._file.flush()
    except OSError as error:
      raise OSError(f"{self._path}: cannot be written ({error.strerror}); make room, and start again") from error
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def close(self):
    if self._writes:
      with contextlib.suppress(OSError):  # of a full disk, which was told when the line was written
        self._file.close()
        self._board.close()

  def _keep_up_to(self, step: int):
    if not os.path.exists(self._path):
      return
    with open(self._path, encoding="utf-8") as file:
      # The last line of a killed run may be half a line.
      kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
    with whole(self._path, "w") as file:
      file.writelines(kept)


def _memory() -> list[Mapping[str, int]]:
  """What this process's devices tell of their memory: CPUs nothing."""
  return [found for device in jax.local_devices() if (found := device.memory_stats())]
