"""Evaluation of a run while it trains: a few samples every so often, compared while the next steps run."""

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from eqm_jax import distributed, pages, plotting
from eqm_jax.checks import at_least, one_of
from eqm_jax.evaluation import evaluator
from eqm_jax.evaluation.reference_data import ReferenceData
from eqm_jax.io import read_json, write_json
from eqm_jax.sampling import labels as labels_lib
from eqm_jax.sampling.generator import Generator
from eqm_jax.sampling.sample_store import SampleStore
from eqm_jax.training import run_page, sharding
from eqm_jax.training.metric_logger import MetricLogger
from eqm_jax.training.state import TrainState

FILE = "best.json"  # in the workdir: the metrics so far, and the best step
CURVE = "best.png"  # the distances over the steps
IN_PICTURE = 20  # samples, the same at every step
DIRECTORY = os.path.join("evaluation", evaluator.CHUNKS)  # in the workdir: what is being compared
CLOSE_SECONDS = 5.0
WAIT_SECONDS = 600.0  # for the samples of the other processes, which sample at the same time

log = logging.getLogger(__name__)


class PeriodicEvaluation:
  """The metrics of a run so far. The best step has the lowest Fréchet distance in the first kind of features.

  Every process samples on its own devices, between two training steps. A thread of the first process computes the
  metrics while training goes on: eigenvalues of large matrices take long, and no device (precision and recall take a
  little of one).
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: str,
    mesh: Mesh,
    reference: ReferenceData,
    generator: Generator,
  ):
    """Evaluates as the section evaluation.during_training says.

    Args:
      config: the whole config.
      workdir: of the run.
      mesh: of the devices that hold the run's parameters.
      reference: the real data.
      generator: of samples; its parameters are replaced at each evaluation.
    """
    self._options = config.evaluation
    self._row_name = config.evaluation.during_training.sampler
    self._row = config.samplers[self._row_name]
    self._reference, self._generator = reference, generator
    self._workdir = workdir
    self._directory, self._path = os.path.join(workdir, DIRECTORY), os.path.join(workdir, FILE)
    settings = reference.settings(self._row, generator) | {
      "num_samples": self._options.during_training.num_samples,
      "weights": self._options.weights,
      "real": reference.origins,
    }
    self._settings = json.loads(json.dumps(settings))
    self._metrics: dict[int, Any] = {}
    self._gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
    self._pending: tuple[int, _Comparison | None] | None = None

  def resume(self, first_step: int, logger: MetricLogger):
    """Reads the metrics up to the step that the run resumes from, if they were computed in the same way."""
    self._logger, self._metrics = logger, self._read(first_step)

  @property
  def best(self) -> int | None:
    """The best step so far, the same in all processes."""
    distances = {step: self._distance(metrics) for step, metrics in self._metrics.items()}
    return min(distances, key=lambda step: (distances[step], step)) if distances else None

  def is_due(self, step: int) -> bool:
    """Whether a step has to be evaluated and is not yet."""
    return step > 0 and step % self._options.during_training.every == 0 and step not in self._metrics

  def start_if_due(self, step: int, state: TrainState):
    """Samples with the weights that `evaluation.weights` names, and starts the comparison."""
    if not self.is_due(step):
      return
    with self._logger.excluded_from_timing():
      self.collect(wait=True)
      params = self._gather(state.ema_params if self._options.weights == "ema" else state.params)
      params = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), params)
      generator = dataclasses.replace(self._generator, params=params)
      count, num_classes = self._options.during_training.num_samples, generator.model.num_classes
      label_N = evaluator.requested_labels(self._options, count, num_classes)
      store = self._reference.sample(self._row_name, self._row, label_N, generator, self._directory)
      is_first = distributed.process_index_and_count()[0] == 0
      captions = generator.captions(label_N[:IN_PICTURE])
      columns = labels_lib.columns(self._options.labels, num_classes)
      self._pending = step, _Comparison(self._reference, store, columns, captions) if is_first else None

  def collect(self, *, wait: bool):
    """Writes the metrics of the last samples, if they are computed; with `wait`, once they are.

    With `wait` all processes must call it: they exchange the distance, so that all keep the same checkpoints.
    """
    if self._pending is None:
      return
    step, comparison = self._pending
    if not wait and (distributed.process_index_and_count()[1] > 1 or comparison.is_alive()):
      return
    self._pending = None
    metrics = comparison.result() if comparison else None
    distance = float(distributed.from_all(np.asarray(self._distance(metrics) if metrics else np.inf))[0])
    if not np.isfinite(distance):
      return
    self._metrics[step] = metrics or {self._options.features[0]: {"frechet": distance}}
    if metrics:
      self._write()
      self._logger.write_evaluation(step, evaluator.flat(metrics))
      path = run_page.picture_path(self._workdir, step)
      os.makedirs(os.path.dirname(path), exist_ok=True)
      comparison.picture.save(path)
      self._logger.write_picture(step, "samples", comparison.picture)
      run_page.write(self._workdir)

  def close(self):
    """Waits a little for a comparison that nobody collects: one that works with JAX when Python ends would abort it."""
    if self._pending and self._pending[1]:
      self._pending[1].join(CLOSE_SECONDS)

  def _read(self, first_step: int) -> dict[int, Any]:
    if not os.path.exists(self._path):
      return {}
    saved = read_json(self._path)
    if saved["settings"] != self._settings:
      log.warning("%s: metrics of other settings; they are dropped", self._path)
      return {}
    return {int(step): metrics for step, metrics in saved["metrics"].items() if int(step) <= first_step}

  def _write(self):
    best = {"step": self.best, "frechet": self._distance(self._metrics[self.best])}
    write_json(self._path, {"best": best, "settings": self._settings, "metrics": self._metrics})
    steps, space = sorted(self._metrics), self._options.features[0]
    metrics = [self._metrics[step][space] for step in steps]
    errors = [one.get("frechet_error") or 0.0 for one in metrics]
    curve = plotting.metric_curve(steps, [one["frechet"] for one in metrics], errors, f"Fréchet distance ({space})")
    curve.save(os.path.join(self._workdir, CURVE))

  def _distance(self, metrics: dict[str, Any]) -> float:
    return metrics[self._options.features[0]]["frechet"]


class NoEvaluation:
  """The place of a PeriodicEvaluation in a run that has none."""

  best = None

  def resume(self, first_step: int, logger: MetricLogger):
    pass

  def is_due(self, step: int) -> bool:
    return False

  def start_if_due(self, step: int, state: TrainState):
    pass

  def collect(self, *, wait: bool):
    pass

  def close(self):
    pass


class _Comparison(threading.Thread):
  """Computes the metrics of one sample set. A daemon: a process that ends does not wait for it."""

  def __init__(self, reference: ReferenceData, store: SampleStore, columns: int, captions: Sequence[str] | None):
    super().__init__(name="comparison", daemon=True)
    self._reference, self._store, self._result = reference, store, None
    self._columns, self._captions = columns, captions
    self.picture: Image.Image | None = None  # of the first samples, once there are metrics
    self.start()

  def run(self):
    try:
      self._store.wait(WAIT_SECONDS)
      metrics = self._reference.metrics(self._store)
      self.picture = evaluator.picture(self._store, self._reference, self._columns, IN_PICTURE, self._captions)
      self.picture.thumbnail((pages.MAX_WIDTH, pages.MAX_WIDTH))
      self._result = metrics
    except Exception as error:  # early samples may diverge, a device may have no room: training goes on
      log.warning("evaluation during training: %s", error)
    self._store.remove()

  def result(self) -> dict[str, Any] | None:
    """The metrics, once they are computed; None: they could not be."""
    self.join()
    return self._result


def open_evaluation(
  config: ml_collections.ConfigDict,
  workdir: str,
  mesh: Mesh,
  reference: ReferenceData | None,
  generator: Generator | None,
) -> PeriodicEvaluation | NoEvaluation:
  """The evaluation that the config asks for; none without real data to compare with."""
  if reference is None or config.evaluation.during_training.every is None:
    return NoEvaluation()
  return PeriodicEvaluation(config, workdir, mesh, reference, generator)


def check(config: ml_collections.ConfigDict, generator: Generator):
  """Refuses settings of evaluation.during_training that do not work.

  Raises:
    ValueError: naming the key and the value.
  """
  key, options = "evaluation.during_training", config.evaluation.during_training
  if options.every is None:
    return
  at_least(f"{key}.every", options.every, 1, "None for no evaluation during training")
  at_least(f"{key}.num_samples", options.num_samples, 2, "a distance needs two samples")
  one_of(f"{key}.sampler", options.sampler, config.samplers, "these are the samplers of this config")
  generator.check(options.sampler, config.samplers[options.sampler])
