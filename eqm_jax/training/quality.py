"""Evaluates a run while it trains: a few samples every so often, compared beside the next steps."""

import concurrent.futures
import logging
import os
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from eqm_jax import devices
from eqm_jax.evaluation import evaluate, pictures, samplers
from eqm_jax.evaluation.comparison import Comparison
from eqm_jax.evaluation.parts import Parts
from eqm_jax.files import read_json, write_json
from eqm_jax.networks.dit import DiT
from eqm_jax.training import sharding
from eqm_jax.training.metrics import MetricWriter

FILE = "best.json"  # in the workdir: the scores so far, and the step of the best
PICTURE = "best.png"  # the distances over the steps

log = logging.getLogger(__name__)


class Quality:
  """The scores of a run, in best.json and best.png. The best step has the lowest Fréchet distance
  in the first kind of features.

  Samples are drawn between two training steps, by every process on its own devices. They are compared in a thread of
  the first process while training goes on: eigenvalues of large matrices take long, and no device.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: str,
    model: DiT,
    known: Comparison,
    batching: samplers.Batching,
    first_step: int,
  ):
    """Reads what the run before it was stopped had found, up to `first_step`.

    Args:
      config: the whole config.
      workdir: of the run.
      model: what is trained.
      known: the real data.
      batching: how samples are drawn.
      first_step: the step that the run goes on from.
    """
    self._options, self._row_name = config.evaluation, config.evaluation.during_training.sampler
    self._row, self._model, self._known, self._batching = config.samplers[self._row_name], model, known, batching
    self._directory = os.path.join(workdir, "evaluation", evaluate.UNITS)
    self._path = os.path.join(workdir, FILE)
    there = read_json(self._path)["scores"] if os.path.exists(self._path) else {}
    self._scores = {int(step): found for step, found in there.items() if int(step) <= first_step}
    self._pending: tuple[int, concurrent.futures.Future] | None = None
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "scores")

  @property
  def best(self) -> int | None:
    """The best step so far, the same on all processes."""
    finite = {step: self._distance(found) for step, found in self._scores.items()}
    return min(finite, key=lambda step: (finite[step], step)) if finite else None

  def is_due(self, step: int) -> bool:
    """Whether a step is evaluated that is not yet."""
    return step > 0 and step % self._options.during_training.every == 0 and step not in self._scores

  def draw(self, step: int, params: Any, mesh: Mesh, writer: MetricWriter):
    """Draws samples with `params`, wherever they are, and begins to compare them."""
    self.collect(writer)
    whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))(params)
    params = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), whole)
    count = self._options.during_training.samples
    label_N = samplers.LABELS[self._options.labels](count, self._model.num_classes, self._options.seed)
    parts = self._known.draw(self._row_name, self._row, self._model, params, label_N, self._batching, self._directory)
    self._pending = step, self._thread.submit(self._compare, parts) if devices.process()[0] == 0 else None

  def collect(self, writer: MetricWriter, wait: bool = True):
    """Writes the scores of the last samples, if they are there; with `wait`, once they are there.

    With `wait` all processes must call it: they learn the distance, so that all keep the same checkpoints.
    """
    if self._pending is None or not (wait or (self._pending[1] is not None and self._pending[1].done())):
      return
    if not wait and devices.process()[1] > 1:
      return
    step, future = self._pending
    self._pending = None
    found = future.result() if future is not None else None
    distance = devices.from_all(np.asarray(self._distance(found) if found else np.inf))[0]
    if not np.isfinite(distance):
      return
    self._scores[step] = found or {self._options.features[0]: {"frechet": float(distance)}}
    if future is None:
      return
    best = {"step": self.best, "frechet": self._distance(self._scores[self.best])}
    write_json(self._path, {"best": best, "features": self._options.features[0], "scores": self._scores})
    self._draw()
    flat = {f"{space}/{score}": value for space, scores in found.items() for score, value in scores.items()}
    writer.write_scores(step, {name: value for name, value in flat.items() if value is not None})

  def close(self):
    """Waits for nothing."""
    self._thread.shutdown(wait=False, cancel_futures=True)

  def _draw(self):
    space = self._options.features[0]
    steps = sorted(self._scores)
    found = [self._scores[step][space] for step in steps]
    errors = [one.get("frechet_error") or 0.0 for one in found]
    curve = pictures.score_curve(steps, [one["frechet"] for one in found], errors, f"Fréchet distance ({space})")
    curve.save(os.path.join(os.path.dirname(self._path), PICTURE))

  def _compare(self, parts: Parts) -> dict[str, Any] | None:
    parts.wait()
    try:
      found = self._known.scores(parts)
    except ValueError as error:  # early in training samples may diverge: that ends no run
      log.warning("evaluation during training: %s", error)
      found = None
    parts.remove()
    return found

  def _distance(self, found: dict[str, Any]) -> float:
    return found[self._options.features[0]]["frechet"]


def check(config: ml_collections.ConfigDict, model: DiT, batching: samplers.Batching):
  """Refuses settings of evaluation.during_training that cannot be.

  Raises:
    ValueError: naming the key and the value.
  """
  options = config.evaluation.during_training
  if options.every < 0 or (options.every and options.samples < 2):
    raise ValueError(
      f"evaluation.during_training: every = {options.every} must not be negative (0: never), "
      f"and samples = {options.samples} must be at least 2"
    )
  if options.every and options.sampler not in config.samplers:
    raise ValueError(
      f"evaluation.during_training.sampler = {options.sampler!r} is not one of the samplers: "
      + ", ".join(config.samplers)
    )
  if options.every:
    samplers.check(options.sampler, config.samplers[options.sampler], model, batching)
