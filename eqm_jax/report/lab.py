"""What every claim is measured with: models, data, sampling, scores, and the spread over seeds."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

from eqm_jax import devices
from eqm_jax.data import sources
from eqm_jax.equilibrium import field
from eqm_jax.evaluation import agreement, distances, evaluate, samplers
from eqm_jax.report.runs import EXPECTED, Runs, Trained
from eqm_jax.training import state

HOLDS, PARTLY, FAILS = "holds", "holds in part", "does not hold"
LAMBDA = EXPECTED["objective.schedule.multiplier"]  # of report.step_size; a field with another λ gets η·LAMBDA/λ


class Lab:
  """The report's instruments.

  Samples are drawn once: asking again for the same ones gives those from memory.
  """

  def __init__(self, config: ml_collections.ConfigDict, workdir: str):
    self.options, self.directory = config.report, os.path.join(workdir, "figures")
    os.makedirs(self.directory, exist_ok=True)
    self.seeds = range(config.report.seeds)
    self.models = Runs(config, workdir)
    self._row = next(iter(config.samplers.values()))
    self.train = sources.open_source(config.data.source, {**config.data.options})
    self.held_out = sources.open_source(config.data.source, {**config.data.options, "part": "test"})
    self.real = self.train.images
    self.classifier = agreement.Classifier(self.real, self.train.labels)
    self.label_N = samplers.balanced_labels(config.report.samples, self.train.num_classes)
    self._drawn: dict[Any, samplers.Drawn] = {}

  def row(self, trained: Trained, **changes: Any) -> ml_collections.ConfigDict:
    """A row of the samplers: by default a full descent in lockstep, or for flow matching Euler."""
    row = self._row.copy_and_resolve_references()
    row.update(
      rule="euler" if trained.config.objective.kind == "flow_matching" else "gd",
      step_size=self.options.step_size * LAMBDA / self.multiplier(trained),
      momentum=0.0,
      max_evaluations=self.options.evaluations,
      threshold=0.0,
      streaming=False,
    )
    row.update(changes)
    return row

  def field(self, trained: Trained) -> field.ConditionalField:
    """The field of a model, on this process's devices."""
    params = devices.replicate(trained.params)
    return field.conditional_field(trained.model, params)

  def multiplier(self, trained: Trained) -> float:
    """λ of a model."""
    return evaluate.schedule_of(trained.config).multiplier

  def batching(self, trained: Trained) -> samplers.Batching:
    """How samples of a model are drawn: with keys of its own seed."""
    key = state.stream_key(trained.seed, "samples")
    return samplers.Batching(self.options.batch_size, key, self.multiplier(trained))

  def sample(self, name: str, seed: int, again: bool = False, **changes: Any) -> samplers.Drawn:
    """Samples of one model, one for each of `label_N`; `again` draws them even if they are known."""
    key = (name, seed, *sorted(changes.items()))
    if again or key not in self._drawn:
      trained = self.models(name, seed)
      row = self.row(trained, **changes)
      self._drawn[key] = samplers.draw(name, row, trained.model, trained.params, self.label_N, self.batching(trained))
    return self._drawn[key]

  def scores(self, name: str, seed: int, **changes: Any) -> dict[str, float]:
    """Fréchet distance to the training images, and label agreement."""
    x = self.sample(name, seed, **changes).result.x
    return {"frechet": self.frechet(x), "agreement": self.agreement(x, self.label_N)}

  def over_seeds(self, name: str, **changes: Any) -> dict[str, list[float]]:
    """The scores of every seed."""
    found = [self.scores(name, seed, **changes) for seed in self.seeds]
    return {score: [one[score] for one in found] for score in found[0]}

  def evaluations(self, name: str, **changes: Any) -> str:
    """The mean number of evaluations of a sample, as it was measured."""
    drawn = [self.sample(name, seed, **changes) for seed in self.seeds]
    return f"{np.mean([one.result.evaluations_B.mean() for one in drawn]):.0f}"

  def frechet(self, images: np.ndarray) -> float:
    """To the training images, in pixels; infinite if an image is not finite."""
    images = np.clip(images, -1, 1).reshape(len(images), -1)
    if not np.all(np.isfinite(images)):
      return float("inf")
    return distances.frechet_distance(images, self.real.reshape(len(self.real), -1))

  def agreement(self, images: np.ndarray, labels: np.ndarray) -> float:
    """How often the classifier sees the class that was asked for."""
    return self.classifier.agreement(np.nan_to_num(np.clip(images, -1, 1)), labels)


def ahead(ours: Sequence[float], theirs: Sequence[float]) -> str:
  """Whether `ours` are lower than `theirs`: by more than the spread of both, within it, or not.

  One seed has no spread to judge by: then the best verdict is "holds in part".
  """
  if not np.all(np.isfinite([*ours, *theirs])):  # a distance of samples that ran away
    return HOLDS if np.all(np.isfinite(ours)) else FAILS
  gap = np.mean(theirs) - np.mean(ours)
  if gap <= 0:
    return FAILS
  return HOLDS if min(len(ours), len(theirs)) > 1 and gap > np.hypot(deviation(ours), deviation(theirs)) else PARTLY


def jointly(verdicts: Sequence[str]) -> str:
  """The verdict of a claim that needs every part: one part that fails is enough to fail."""
  return FAILS if FAILS in verdicts else in_parts(verdicts)


def in_parts(verdicts: Sequence[str]) -> str:
  """The verdict of a claim whose parts count by themselves: it holds in part where some do."""
  return verdicts[0] if len(set(verdicts)) == 1 else PARTLY


def deviation(values: Sequence[float]) -> float:
  """The standard deviation over seeds, as estimated from these; 0 of one."""
  return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int = 3) -> str:
  """Mean ± standard deviation over seeds."""
  return f"{np.mean(values):.{digits}f} ± {deviation(values):.{digits}f}"


Claim = Callable[[Lab], dict[str, Any]]
