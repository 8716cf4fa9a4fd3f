"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases and one line of text, by the first process."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tensorboardX
from PIL import Image

from eqm_jax import distributed, hardware
from eqm_jax.equilibrium import gamma, objective
from eqm_jax.io import atomic_write
from eqm_jax.progress import Heartbeat, bar, duration, in_notebook
from eqm_jax.training.wandb_run import WandbRun

FILE = "metrics.jsonl"  # in the workdir

log = logging.getLogger(__name__)


class MetricLogger:
  """Fetches the metrics of each step a step late, checks that they are finite, and writes every `log_every`-th.

  The device thus always has work queued. When nothing has been logged for a while, a line with the progress appears.
  A resumed run drops the records that the killed one wrote past its checkpoint.
  """

  def __init__(
    self,
    workdir: str,
    *,
    first_step: int,
    last_step: int,
    batch_size: int,
    log_every: int,
    flops_per_example: int,
    loss_scale: float = 1.0,
    skipped_batches: int = 0,
    newest_checkpoint: Callable[[], int | None] = lambda: None,
    wandb_run: WandbRun | None = None,
  ):
    """Opens the files.

    Args:
      workdir: of the run.
      first_step: the step that the run resumes from, or 0.
      last_step: of the run.
      batch_size: the global one.
      log_every: steps from one record to the next.
      flops_per_example: of the model, forward and backward.
      loss_scale: E[c²], by which losses of different schedules become comparable.
      skipped_batches: by the run so far.
      newest_checkpoint: its step, for errors.
      wandb_run: takes the same metrics and pictures, and is closed with this logger.
    """
    self._writes = distributed.process_index_and_count()[0] == 0
    if self._writes:
      self._path = os.path.join(workdir, FILE)
      self._keep_up_to(first_step)
      self._file = open(self._path, "a", encoding="utf-8")
      self._board = tensorboardX.SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=first_step + 1)
    self._last_step, self._batch_size, self._log_every = last_step, batch_size, log_every
    self._wandb_run = wandb_run
    self._flops, self._loss_scale, self._newest_checkpoint = flops_per_example, loss_scale, newest_checkpoint
    self._skipped_batches = skipped_batches
    self._previous: tuple[int, Mapping[str, jax.Array]] | None = None  # dispatched, not fetched
    self._written = _Clock()  # since the last record
    self._fetched = _Clock()  # since the first step of this process
    self._newest_step: int | None = None
    self._waited = 0.0  # seconds for data since the last record
    self._excluded = False
    self._begin = time.monotonic()
    self._heartbeat = Heartbeat(self._log_progress)
    # A terminal has the lines.
    self._bar = bar(not in_notebook(), desc="training", unit="step", total=last_step, initial=first_step)

  @contextlib.contextmanager
  def data_wait(self) -> Iterator[None]:
    """Counts the time inside as time that the run waits for its data."""
    begin = time.monotonic()
    yield
    self._waited += time.monotonic() - begin

  @contextlib.contextmanager
  def excluded_from_timing(self) -> Iterator[None]:
    """Leaves the time inside out of the rates: it is not spent on training."""
    begin, self._excluded = time.monotonic(), True
    yield
    for clock in (self._written, self._fetched):
      clock.exclude(time.monotonic() - begin)
    self._excluded = False
    self._heartbeat.reset()

  def log_previous(self, step: int, metrics: Mapping[str, jax.Array]):
    """Takes the metrics of a step that has been dispatched, and fetches those of the step before it.

    Raises:
      FloatingPointError: naming the step, if those are not finite.
    """
    previous, self._previous = self._previous, (step, metrics)
    if previous:
      self._fetch(*previous)

  def flush(self):
    """Fetches the metrics of the last step.

    Raises:
      FloatingPointError: naming the step, if they are not finite.
    """
    previous, self._previous = self._previous, None
    if previous:
      self._fetch(*previous)

  def write_evaluation(self, step: int, metrics: Mapping[str, float]):
    """Writes the metrics of an evaluation, which may end some steps after the one it evaluates."""
    self._record(step, metrics)
    self._log("evaluation of step %d  %s", step, _text(metrics, 4))

  def write_picture(self, step: int, name: str, picture: Image.Image):
    """Writes a picture to TensorBoard and Weights & Biases."""
    if self._writes:
      self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    if self._wandb_run:
      self._wandb_run.log_picture(step, name, picture)

  def write(self, step: int, metrics: Mapping[str, float]):
    """Writes the metrics of one step, and the speed since the last record.

    Added are examples_per_second, of all devices and of each; data_wait, the share of the time spent waiting for data;
    mfu, the share of the devices' peak rate that the model's own arithmetic takes; device_gib, the largest memory use
    of one of this process's devices so far. A value that the device does not report is left out.
    """
    metrics, progress = dict(metrics), ""
    if self._written.step is not None:  # the first interval would count compilation
      rate, seconds = self._written.rate(step), self._written.seconds()
      metrics["examples_per_second"] = rate * self._batch_size
      metrics["examples_per_second_per_device"] = rate * self._batch_size / jax.device_count()
      metrics["data_wait"] = self._waited / seconds
      if chip := hardware.chip_of(jax.devices()[0].device_kind):
        metrics["mfu"] = metrics["examples_per_second_per_device"] * self._flops / chip.flops
      peaks = [stats["peak_bytes_in_use"] for stats in _memory_stats() if "peak_bytes_in_use" in stats]
      if peaks:
        metrics["device_gib"] = max(peaks) / 2**30
      progress = f"  {duration((self._last_step - step) / rate)} left"
    self._written.start(step)
    self._waited = 0.0
    self._record(step, metrics)
    self._log("step %d/%d  %s%s", step, self._last_step, _text(metrics, 5), progress)

  def close(self):
    self._heartbeat.close()
    self._bar.close()
    if self._wandb_run:
      self._wandb_run.close()
    if self._writes:
      with contextlib.suppress(OSError):  # of a full disk, which the write of the line has reported
        self._file.close()
        self._board.close()

  def _fetch(self, step: int, metrics: Mapping[str, jax.Array]):
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if self._fetched.step is None:
      self._fetched.start(step)
    self._newest_step = step
    self._bar.update(step - self._bar.n)
    self._check_finite(step, metrics)
    if step % self._log_every == 0 or step in (1, self._last_step):
      self.write(step, {**metrics, "relative_loss": metrics["loss"] / self._loss_scale})

  def _check_finite(self, step: int, metrics: Mapping[str, float]):
    """A skipped batch has spoilt its loss, but not the parameters."""
    skipped_before, self._skipped_batches = self._skipped_batches, metrics.get("skipped_batches", 0)
    is_skipped = self._skipped_batches > skipped_before
    text = ", ".join(f"{name} = {value}" for name, value in metrics.items())
    if not all(np.isfinite(metrics[name]) for name in (("parameter_norm", "learning_rate") if is_skipped else metrics)):
      raise FloatingPointError(
        f"step {step}: {text}; stopped. The newest checkpoint is that of step {self._newest_checkpoint()}"
      )
    if is_skipped:
      log.warning("step %d: %s; this batch is skipped", step, text)

  def _record(self, step: int, metrics: Mapping[str, float]):
    if not self._writes:
      return
    # JSON has no number for the loss of a skipped batch.
    record = {"step": step} | {name: value if np.isfinite(value) else None for name, value in metrics.items()}
    try:
      self._file.write(json.dumps(record) + "\n")
      self._file.flush()
    except OSError as error:
      raise OSError(f"{self._path}: cannot be written ({error.strerror}); make room, and start again") from error
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)
    if self._wandb_run:
      self._wandb_run.log(step, metrics)

  def _log(self, text: str, *values: Any):
    log.info(text, *values)
    self._heartbeat.reset()

  def _log_progress(self):
    """Called by the heartbeat, in its thread."""
    step, first = self._newest_step, self._fetched.step
    if self._excluded:  # what runs instead reports its own progress
      return
    if step is None:
      log.info("first step: %s so far, compilation included", duration(time.monotonic() - self._begin))
    elif step == first:
      log.info("step %d/%d", step, self._last_step)
    else:
      rate = self._fetched.rate(step)
      left = duration((self._last_step - step) / rate)
      log.info("step %d/%d  %.4g images/s  %s left", step, self._last_step, rate * self._batch_size, left)

  def _keep_up_to(self, step: int):
    if not os.path.exists(self._path):
      return
    with open(self._path, encoding="utf-8") as file:
      # The last line of a killed run may be incomplete.
      kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
    with atomic_write(self._path, "w") as file:
      file.writelines(kept)


class _Clock:
  """Steps per second since a step."""

  def __init__(self):
    self.step: int | None = None
    self._time = 0.0

  def start(self, step: int):
    self.step, self._time = step, time.monotonic()

  def exclude(self, seconds: float):
    self._time += seconds

  def seconds(self) -> float:
    return time.monotonic() - self._time

  def rate(self, step: int) -> float:
    return (step - self.step) / self.seconds()


def loss_scale(config: ml_collections.ConfigDict) -> float:
  """E[c²] of the samples; 1 for flow matching, which has c ≡ 1. `config` is the section objective."""
  if config.kind != "equilibrium":
    return 1.0
  schedule = objective.schedule_of(config)
  at_data = float(objective.magnitude(jnp.ones(()), schedule)) ** 2
  elsewhere = gamma.mean_square_magnitude(schedule, gamma.GammaDensity(**config.gamma))
  return (1 - config.clean_fraction) * elsewhere + config.clean_fraction * at_data


def _text(metrics: Mapping[str, float], digits: int) -> str:
  return "  ".join(f"{name} {value:.{digits}g}" for name, value in metrics.items())


def _memory_stats() -> list[Mapping[str, int]]:
  """Memory statistics of this process's devices; CPUs have none."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  return [one for one in stats if one]
