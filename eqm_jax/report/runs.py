"""The models that the report compares, each trained once for each seed."""

import dataclasses
import os
from typing import Any

import ml_collections

from eqm_jax.networks.dit import DiT
from eqm_jax.training import checkpoint, checks, pretrained, train

# What the claims take for granted of the config.
EXPECTED: dict[str, Any] = {
  "objective.kind": "equilibrium",
  "objective.schedule.kind": "truncated",
  "objective.schedule.a": 0.8,
  "objective.schedule.multiplier": 4.0,
  "objective.clean_share": 0.0,
  "model.energy": "none",
  "model.time_input": False,
  "data.source": "digits",
  "data.options.part": "train",
}
# What differs from it; everything else is the same for all models.
CHANGES: dict[str, dict[str, Any]] = {
  "eqm": {},
  "flow_matching": {"objective.kind": "flow_matching", "model.time_input": True},
  "flow_matching_untimed": {"objective.kind": "flow_matching"},
  "linear": {"objective.schedule.kind": "linear"},
  "piecewise": {"objective.schedule.kind": "piecewise"},
  "lambda_1": {"objective.schedule.multiplier": 1.0},
  "lambda_2": {"objective.schedule.multiplier": 2.0},
  "lambda_8": {"objective.schedule.multiplier": 8.0},
  "dot": {"model.energy": "dot"},
  "scalar": {"model.energy": "scalar"},
  "l2": {"model.energy": "l2"},  # and started from "eqm"
}
# Seconds of a step relative to an implicit one, for the time left.
COST = {"dot": 1.8, "scalar": 1.8, "l2": 1.8}


class Stopped(Exception):
  """SIGTERM came during a training, which has saved what it had."""


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model of the report."""

  name: str
  seed: int
  model: DiT
  params: Any  # the averaged weights
  config: ml_collections.ConfigDict


class Runs:
  """Trains models when they are first asked for, under `workdir`/models."""

  def __init__(self, config: ml_collections.ConfigDict, workdir: str):
    self._config, self._workdir = config, workdir
    self._loaded: dict[tuple[str, int], Trained] = {}

  def config_of(self, name: str, seed: int) -> ml_collections.ConfigDict:
    """The config of one model."""
    config = self._config.copy_and_resolve_references()
    config.seed = seed
    config.update_from_flattened_dict(CHANGES[name])
    if name == "l2":
      config.train.init_from = self.directory("eqm", seed)
    return config

  def directory(self, name: str, seed: int) -> str:
    """The workdir of one model."""
    return os.path.join(self._workdir, "models", f"{name}-{seed}")

  def is_trained(self, name: str, seed: int) -> bool:
    """Whether it has been trained to its end."""
    return self._config.train.steps in checkpoint.steps(self.directory(name, seed))

  def __call__(self, name: str, seed: int) -> Trained:
    """The model, trained if it is not yet.

    Raises:
      Stopped: when SIGTERM came first.
    """
    if (name, seed) not in self._loaded:
      config, directory = self.config_of(name, seed), self.directory(name, seed)
      if name == "l2":
        self("eqm", seed)
      if self.is_trained(name, seed):
        checks.check_same_run(directory, config)
      elif not train.train(config, directory):
        raise Stopped
      loaded = pretrained.load(directory)
      self._loaded[name, seed] = Trained(name, seed, loaded.model, loaded.params, config)
    return self._loaded[name, seed]
