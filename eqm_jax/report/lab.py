"""What every claim is measured with: trained models, data, samples, metrics, and verdicts over seeds."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

from eqm_jax.checkpoints import manager as checkpoint_manager
from eqm_jax.checkpoints import pretrained
from eqm_jax.data import samples as samples_lib
from eqm_jax.data import sources
from eqm_jax.equilibrium import objective, sampler
from eqm_jax.evaluation import metrics
from eqm_jax.evaluation.features import PixelClassifier
from eqm_jax.sampling import applications, labels
from eqm_jax.sampling.generator import Generator, Samples
from eqm_jax.training import state, train, validation

HOLDS, PARTLY, FAILS = "holds", "holds in part", "does not hold"
# What the claims presuppose of the config.
EXPECTED: dict[str, Any] = {
  "objective.kind": "equilibrium",
  "objective.schedule.kind": "truncated",
  "objective.schedule.a": 0.8,
  "objective.schedule.multiplier": 4.0,
  "objective.gamma.kind": "uniform",
  "objective.clean_fraction": 0.0,
  "model.energy": "none",
  "model.time_input": False,
  "data.options.part": "train",  # the part "test" is held out
}
MULTIPLIER = EXPECTED["objective.schedule.multiplier"]  # λ that report.step_size is for
CONSISTENT = {"objective.gamma.kind": "consistent"}
# The models, and how their configs differ from it; everything else is the same for all.
MODELS: dict[str, dict[str, Any]] = {
  "eqm": {},
  "flow_matching": {"objective.kind": "flow_matching", "model.time_input": True},
  "flow_matching_untimed": {"objective.kind": "flow_matching"},
  "linear": {"objective.schedule.kind": "linear"},
  "piecewise": {"objective.schedule.kind": "piecewise"},
  "self_stopping": {"objective.schedule.kind": "self_stopping"},
  "consistent": CONSISTENT | {"objective.gamma.floor": 0.05},
  "linear_consistent": CONSISTENT | {"objective.gamma.floor": 0.05, "objective.schedule.kind": "linear"},
  "self_stopping_consistent": CONSISTENT | {"objective.schedule.kind": "self_stopping"},
  "logit_normal": {"objective.gamma.kind": "logit_normal"},
  "lambda_1": {"objective.schedule.multiplier": 1.0},
  "lambda_2": {"objective.schedule.multiplier": 2.0},
  "lambda_8": {"objective.schedule.multiplier": 8.0},
  "dot": {"model.energy": "dot"},
  "scalar": {"model.energy": "scalar"},
  "l2": {"model.energy": "l2"},  # initialised with the parameters of "eqm"
  "modern": {"model.qk_norm": True, "model.norm": "rms", "model.mlp": "swiglu", "model.rope": True},
}


class Preempted(Exception):
  """SIGTERM stopped a training, which has saved its state."""


class Models:
  """The models of a report, under WORKDIR/models; each is trained once for each seed, on first use."""

  def __init__(self, config: ml_collections.ConfigDict, workdir: str):
    self._config, self._workdir = config, workdir
    self._loaded: dict[tuple[str, int], pretrained.Pretrained] = {}

  def config(self, name: str, seed: int) -> ml_collections.ConfigDict:
    """The config of a model."""
    config = self._config.copy_and_resolve_references()
    config.seed = seed
    config.update_from_flattened_dict(MODELS[name])
    if name == "l2":
      config.train.init_from = self.directory("eqm", seed)
    return config

  def directory(self, name: str, seed: int) -> str:
    """The workdir of a model."""
    return os.path.join(self._workdir, "models", f"{name}-{seed}")

  def is_trained(self, name: str, seed: int) -> bool:
    """Whether the training of a model has finished."""
    return self._config.train.steps in checkpoint_manager.steps(self.directory(name, seed))

  def load(self, name: str, seed: int) -> pretrained.Pretrained:
    """A model with its averaged weights, trained if necessary.

    Raises:
      Preempted: if SIGTERM comes before the training ends.
    """
    if (name, seed) not in self._loaded:
      config, directory = self.config(name, seed), self.directory(name, seed)
      if name == "l2":
        self.load("eqm", seed)
      if self.is_trained(name, seed):
        validation.check_same_run(directory, config)
      elif not train.train(config, directory):
        raise Preempted
      self._loaded[name, seed] = pretrained.load(directory)
    return self._loaded[name, seed]


class Lab:
  """Models, data, samples and metrics of a report. Samples are kept in memory and not drawn again."""

  def __init__(self, config: ml_collections.ConfigDict, workdir: str):
    self.options, self._directory = config.report, os.path.join(workdir, "figures")
    os.makedirs(self._directory, exist_ok=True)
    self.seeds = range(self.options.seeds)
    self.models = Models(config, workdir)
    self._row = next(iter(config.samplers.values()))
    self.train = sources.open_source(config.data.source, {**config.data.options})
    held_out = sources.open_source(config.data.source, {**config.data.options, "part": "test"})
    index = samples_lib.spread(held_out, self.options.num_held_out)
    self.held_out_images = samples_lib.arrays(held_out, index, config.data.threads)
    self.held_out_labels = held_out.labels[index]
    self.images = samples_lib.arrays(self.train, range(len(self.train)), config.data.threads)
    self.classifier = PixelClassifier(self.images, self.train.labels)
    self.labels = labels.parse("report", "balanced", self.options.num_samples, self.train.num_classes)
    self._generators: dict[tuple[str, int], Generator] = {}
    self._samples: dict[Any, Samples] = {}

  def path(self, file: str) -> str:
    """Path of a figure."""
    return os.path.join(self._directory, file)

  def row(self, name: str, **changes: Any) -> ml_collections.ConfigDict:
    """A sampler row for a model: by default a full descent by static batching, or Euler for flow matching."""
    config = self.models.config(name, 0)
    defaults = {
      "rule": "euler" if config.objective.kind == "flow_matching" else "gd",
      "step_size": self.options.step_size * MULTIPLIER / objective.schedule_of(config.objective).multiplier,
      "momentum": 0.0,
      "max_nfe": self.options.max_nfe,
      "threshold": None,
      "batching": "static",
    }
    return ml_collections.ConfigDict({**self._row.to_dict(), **defaults, **changes})

  def generator(self, name: str, seed: int) -> Generator:
    """The generator of a model, with the random key of its seed."""
    if (name, seed) not in self._generators:
      loaded = self.models.load(name, seed)
      schedule = objective.schedule_of(self.models.config(name, seed).objective)
      self._generators[name, seed] = Generator(
        model=loaded.model,
        params=loaded.params,
        key=state.stream_key(seed, "samples"),
        batch_size=self.options.batch_size,
        multiplier=schedule.multiplier,
        auto_length=sampler.auto_length(schedule),
      )
    return self._generators[name, seed]

  def sample(self, name: str, seed: int, again: bool = False, **changes: Any) -> Samples:
    """Samples of a model with `labels`; `again` repeats a sampling that was done before."""
    key = (name, seed, *sorted(changes.items()))
    if again or key not in self._samples:
      self._samples[key] = self.generator(name, seed).samples(name, self.row(name, **changes), self.labels)
    return self._samples[key]

  def descend(self, name: str, seed: int, start: np.ndarray, labels: np.ndarray, **changes: Any) -> sampler.Result:
    """Descents from the images `start`, by static batching."""
    return applications.descend_images(name, self.generator(name, seed), self.row(name, **changes), start, labels)

  def metrics(self, name: str, **changes: Any) -> dict[str, list[float]]:
    """Fréchet distance and classifier accuracy of samples, one number for each seed."""
    images = [self.sample(name, seed, **changes).result.x for seed in self.seeds]
    return {
      "frechet": [self.frechet(x) for x in images],
      "accuracy": [self.classifier.accuracy(np.nan_to_num(np.clip(x, -1, 1)), self.labels) for x in images],
    }

  def nfe(self, name: str, **changes: Any) -> list[float]:
    """Mean NFE of samples, one number for each seed."""
    return [float(self.sample(name, seed, **changes).result.nfe.mean()) for seed in self.seeds]

  def frechet(self, images: np.ndarray) -> float:
    """Fréchet distance to the training images, in pixels; infinite if an image is not finite."""
    images = np.clip(images, -1, 1).reshape(len(images), -1)
    if not np.all(np.isfinite(images)):
      return float("inf")
    return metrics.frechet_distance(images, self.images.reshape(len(self.images), -1))


def lower(ours: Sequence[float], theirs: Sequence[float]) -> str:
  """Verdict on `ours` being lower than `theirs`: by more than the spread of both, within it, or not.

  One seed has no spread: then the best verdict is "holds in part".
  """
  if not np.all(np.isfinite([*ours, *theirs])):  # the distance of samples that diverged
    return HOLDS if np.all(np.isfinite(ours)) else FAILS
  gap = np.mean(theirs) - np.mean(ours)
  if gap <= 0:
    return FAILS
  has_spread = min(len(ours), len(theirs)) > 1
  return HOLDS if has_spread and gap > np.hypot(deviation(ours), deviation(theirs)) else PARTLY


def all_of(verdicts: Sequence[str]) -> str:
  """Verdict on a claim that needs every part: one that fails is enough to fail."""
  return FAILS if FAILS in verdicts else some_of(verdicts)


def some_of(verdicts: Sequence[str]) -> str:
  """Verdict on a claim of independent parts: it holds in part where some of them do."""
  return verdicts[0] if len(set(verdicts)) == 1 else PARTLY


def deviation(values: Sequence[float]) -> float:
  """Sample standard deviation over seeds; 0 for one seed."""
  return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int = 3) -> str:
  """Mean ± standard deviation over seeds."""
  return f"{np.mean(values):.{digits}f} ± {deviation(values):.{digits}f}"


# A claim measures, draws its figures, and returns what the page shows: criterion, verdict, columns, rows, figures
# {file: caption}, notes (if any) and numbers. Title and what the paper says are in the config.
Claim = Callable[[Lab], dict[str, Any]]
