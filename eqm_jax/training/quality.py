"""Evaluates a run while it trains: a few samples every so often, compared beside the next steps."""

import json
import logging
import os
import threading
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
from eqm_jax.training.state import TrainState

FILE = "best.json"  # in the workdir: the scores so far, and the step of the best
PICTURE = "best.png"  # the distances over the steps
WAIT_SECONDS = 600.0  # for the samples of the other processes, which draw theirs at the same time

log = logging.getLogger(__name__)


class Quality:
  """The scores of a run, in best.json and best.png. The best step has the lowest Fréchet distance
  in the first kind of features.

  Samples are drawn between two training steps, by every process on its own devices. They are compared in a thread of
  the first process while training goes on: eigenvalues of large matrices take long, and no device (precision and recall
  take a little of one).
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: str,
    model: DiT,
    known: Comparison,
    batching: samplers.Batching,
    mesh: Mesh,
    first_step: int,
  ):
    """Reads what the run before it was stopped had found, up to `first_step`, if that can be compared.

    Args:
      config: the whole config.
      workdir: of the run.
      model: what is trained.
      known: the real data.
      batching: how samples are drawn.
      mesh: that the run's parameters are spread over.
      first_step: the step that the run goes on from.
    """
    self._options, self._row_name = config.evaluation, config.evaluation.during_training.sampler
    self._row, self._model, self._known, self._batching = config.samplers[self._row_name], model, known, batching
    self._directory, self._path = os.path.join(workdir, "evaluation", evaluate.UNITS), os.path.join(workdir, FILE)
    settings = known.settings(self._row, batching) | {
      "samples": self._options.during_training.samples,
      "weights": self._options.weights,
      "real": known.real_data,
    }
    self._settings = json.loads(json.dumps(settings))
    self._scores = self._read(first_step)
    self._gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
    self._pending: tuple[int, _Comparing | None] | None = None

  @property
  def best(self) -> int | None:
    """The best step so far, the same on all processes."""
    distances = {step: self._distance(found) for step, found in self._scores.items()}
    return min(distances, key=lambda step: (distances[step], step)) if distances else None

  def is_due(self, step: int) -> bool:
    """Whether a step is evaluated that is not yet."""
    return step > 0 and step % self._options.during_training.every == 0 and step not in self._scores

  def draw(self, step: int, state: TrainState, writer: MetricWriter):
    """Draws samples with the weights that `evaluation.weights` names, and begins to compare them."""
    self.collect(writer)
    params = self._gather(state.ema_params if self._options.weights == "ema" else state.params)
    params = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), params)
    count = self._options.during_training.samples
    label_N = samplers.LABELS[self._options.labels](count, self._model.num_classes, self._options.seed)
    parts = self._known.draw(self._row_name, self._row, self._model, params, label_N, self._batching, self._directory)
    self._pending = step, _Comparing(self._known, parts) if devices.process()[0] == 0 else None

  def collect(self, writer: MetricWriter, wait: bool = True):
    """Writes the scores of the last samples, if they are there; with `wait`, once they are there.

    With `wait` all processes must call it: they learn the distance, so that all keep the same checkpoints.
    """
    if self._pending is None:
      return
    step, comparing = self._pending
    if not wait and (devices.process()[1] > 1 or comparing.is_alive()):
      return
    self._pending = None
    found = comparing.result() if comparing else None
    distance = float(devices.from_all(np.asarray(self._distance(found) if found else np.inf))[0])
    if not np.isfinite(distance):
      return
    self._scores[step] = found or {self._options.features[0]: {"frechet": distance}}
    if found:
      self._write()
      flat = {f"{space}/{score}": value for space, scores in found.items() for score, value in scores.items()}
      writer.write_scores(step, {name: value for name, value in flat.items() if value is not None})

  def _read(self, first_step: int) -> dict[int, Any]:
    there = read_json(self._path) if os.path.exists(self._path) else {"settings": self._settings, "scores": {}}
    if there["settings"] != self._settings:
      log.warning("%s: the scores before were found in another way, and are left out", self._path)
      return {}
    return {int(step): found for step, found in there["scores"].items() if int(step) <= first_step}

  def _write(self):
    best = {"step": self.best, "frechet": self._distance(self._scores[self.best])}
    write_json(self._path, {"best": best, "settings": self._settings, "scores": self._scores})
    steps, space = sorted(self._scores), self._options.features[0]
    found = [self._scores[step][space] for step in steps]
    errors = [one.get("frechet_error") or 0.0 for one in found]
    curve = pictures.score_curve(steps, [one["frechet"] for one in found], errors, f"Fréchet distance ({space})")
    curve.save(os.path.join(os.path.dirname(self._path), PICTURE))

  def _distance(self, found: dict[str, Any]) -> float:
    return found[self._options.features[0]]["frechet"]


class _Comparing(threading.Thread):
  """Compares one series. A daemon: a process that is told to end does not wait for it."""

  def __init__(self, known: Comparison, parts: Parts):
    super().__init__(name="scores", daemon=True)
    self._known, self._parts, self._found = known, parts, None
    self.start()

  def run(self):
    try:
      self._parts.wait(WAIT_SECONDS)
      self._found = self._known.scores(self._parts)
    except Exception as error:  # early samples may diverge, a device may have no room: that ends no training
      log.warning("evaluation during training: %s", error)
    self._parts.remove()

  def result(self) -> dict[str, Any] | None:
    """The scores, once they are there; None: there are none."""
    self.join()
    return self._found


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
