"""Checks before a run begins: a config that does not fit, and a workdir of another run."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from eqm_jax.checkpoints import manager as checkpoint_manager
from eqm_jax.checkpoints import pretrained
from eqm_jax.checks import at_least, in_interval, one_of
from eqm_jax.data.codec import Codec, check_same_autoencoder
from eqm_jax.data.samples import Source
from eqm_jax.equilibrium import energy, gamma
from eqm_jax.equilibrium.objective import Schedule, schedule_of
from eqm_jax.io import read_json
from eqm_jax.networks.dit import DiT, default_attributes

VERSION = "eqm_jax_version"  # in config.json; the first release wrote none
FIRST_VERSION = "0.1.0"

# What may differ between a run and its continuation: it does not affect the parameters (any more), or is checked
# elsewhere: the length of the data set, its classes, and the autoencoder of the latents.
FREE = (
  "autoencoder.batch_size.",
  "autoencoder.name.",
  "autoencoder.path.",
  "autoencoder.sha256.",
  "benchmark.",
  "checkpoint.",
  "data.class_names.",
  "data.num_samples.",
  "data.options.path.",
  "data.options.verify.",
  "data.threads.",
  f"{VERSION}.",
  "evaluation.",
  "mesh.",  # to rounding
  "model.remat.",
  "model.unroll.",
  "prepare.",
  "report.",
  "sample.",
  "samplers.",
  "sharding.",
  "tasks.",
  "train.grad_accum_steps.",
  "train.init_from.",
  "train.log_every.",
  "train.profile.",
  "train.wandb_project.",
)
# Keys of a saved config that a config of the same version may lack.
OPTIONAL = ("data.class_names.", "data.num_samples.", "data.options.", "prepare.", "report.", "samplers.")

NO_GRADIENT = (
  "where the energy ½‖f‖² has no gradient in any parameter. Start from a trained implicit model "
  "(model.energy = 'none', otherwise the same) with train.init_from = its workdir"
)


def check_config(config: ml_collections.ConfigDict, model: DiT):
  """Refuses settings that no data fits.

  Raises:
    ValueError: naming the key and the value.
  """
  _check_objective(config, model)
  in_interval("optimizer.ema_decay", config.optimizer.ema_decay, 0, 1, open_high=True)
  for name in ("train.steps", "train.batch_size", "train.grad_accum_steps", "train.log_every"):
    at_least(name, config.train[name.removeprefix("train.")], 1)
  at_least("checkpoint.every", config.checkpoint.every, 1)
  at_least("checkpoint.keep", config.checkpoint.keep, 1)
  at_least("data.threads", config.data.threads, 1)


def check_fits(
  config: ml_collections.ConfigDict,
  model: DiT,
  source: Source,
  codec: Codec | None,
  autoencoder_id: dict[str, Any] | None,
):
  """Refuses, before anything is compiled, data that does not fit the config.

  Args:
    config: the whole config.
    model: the model to train.
    source: the data set.
    codec: encodes the images of each step; None: nothing is encoded.
    autoencoder_id: of the latents that are trained on; None for pixels.

  Raises:
    ValueError: naming the key and the value.
  """
  shape = codec.latent_shape(source.shape) if codec else source.shape
  if shape != model.input_shape:
    raise ValueError(
      f"data.source {config.data.source!r} has samples of shape {shape}, but the model takes "
      f"{model.input_shape}: set model.input_size and model.channels"
    )
  expected = config.autoencoder
  if autoencoder_id and (
    autoencoder_id["name"] != expected.name or expected.sha256 not in (None, autoencoder_id["sha256"])
  ):
    raise ValueError(
      f"autoencoder.name = {expected.name!r} and autoencoder.sha256 = {expected.sha256!r}, but {config.data.source!r} "
      f"has latents of {autoencoder_id['name']!r}, sha256 {autoencoder_id['sha256']}: set both to these, or "
      "autoencoder.sha256 = None"
    )
  if source.num_classes != model.num_classes:
    raise ValueError(
      f"model.num_classes = {model.num_classes}, but {config.data.source!r} has {source.num_classes} classes"
      f"{_named(source.class_names)}: they must be the same"
    )


def _named(names: Sequence[str] | None, count: int = 5) -> str:
  """The first names of a list, in brackets."""
  if not names:
    return ""
  return f" ({', '.join(names[:count])}{', …' if len(names) > count else ''})"


def _check_objective(config: ml_collections.ConfigDict, model: DiT):
  options = config.objective
  one_of("objective.kind", options.kind, ("equilibrium", "flow_matching"))
  one_of("objective.second_order", options.second_order, energy.SECOND_ORDER)
  try:
    Schedule(**options.schedule)  # of flow matching, too, which does not use it
    gamma.check(gamma.GammaDensity(**options.gamma), schedule_of(options))
  except ValueError as error:
    raise ValueError(f"objective.{error}") from error
  if options.kind == "equilibrium" and model.time_input:
    raise ValueError(
      "model.time_input = True, but objective.kind = 'equilibrium' trains a field without time: set "
      "model.time_input = False"
    )
  in_interval("objective.label_dropout", options.label_dropout, 0, 1)
  in_interval("objective.clean_fraction", options.clean_fraction, 0, 1, open_high=True)
  if model.energy != "none" and options.kind != "equilibrium":
    raise ValueError(
      f"model.energy = {model.energy!r} needs objective.kind = 'equilibrium', not {options.kind!r}: set one of the two"
    )
  if model.energy != "none" and options.dispersive_weight:
    raise ValueError(
      f"objective.dispersive_weight = {options.dispersive_weight} is for implicit fields, but model.energy = "
      f"{model.energy!r}: set it to 0 or model.energy = 'none'"
    )
  if model.energy == "l2" and config.train.init_from is None:
    raise ValueError(f"model.energy = 'l2' starts from an output layer of zeros, {NO_GRADIENT}")
  if config.train.grad_accum_steps > 1 and options.dispersive_weight:
    raise ValueError(
      f"train.grad_accum_steps = {config.train.grad_accum_steps} splits the batch, but the dispersive loss is over all "
      "its pairs: set objective.dispersive_weight = 0 or train.grad_accum_steps = 1"
    )


def check_same_run(
  workdir: str,
  config: ml_collections.ConfigDict,
  autoencoder_id: dict[str, Any] | None = None,
  num_samples: int | None = None,
  class_names: Sequence[str] | None = None,
):
  """Refuses a workdir whose checkpoints were trained with another config, autoencoder, number of samples, or classes.

  Raises:
    ValueError: naming what differs; for a config of an older version, its version.
  """
  saved = check_same_config(workdir, config)
  if saved is None:
    return
  check_same_autoencoder(workdir, pretrained.recorded_autoencoder(saved), autoencoder_id)
  saved_samples = saved["data"].get("num_samples", num_samples)
  if num_samples is not None and saved_samples != num_samples:
    raise ValueError(
      f"{workdir} was trained on {saved_samples} samples, but the data set has {num_samples}. Choose another --workdir"
    )
  _check_classes(workdir, pretrained.recorded_class_names(saved), class_names)


def _check_classes(workdir: str, saved: Sequence[str] | None, current: Sequence[str] | None):
  """Refuses classes that were renamed: in the order of the new names, labels may mean others."""
  for label, (before, now) in enumerate(zip(saved or (), current or ())):
    if before != now:
      raise ValueError(
        f"{workdir} was trained with label {label} for the class {before!r}, but in the data set it is {now!r}. Give "
        "the classes their names again, or choose another --workdir"
      )


def check_same_config(workdir: str, config: ml_collections.ConfigDict) -> dict[str, Any] | None:
  """The config of the checkpoints in a workdir, which must be this one; None if there are none.

  A key that the saved config lacks is new, with a default that changes nothing. What it lacks of the model's attributes
  and of the objective's c(γ) and density of γ has its default, and is compared.

  Raises:
    ValueError: naming what differs; for a config of an older version, its version.
  """
  path = os.path.join(workdir, pretrained.CONFIG)
  if not (os.path.exists(path) and checkpoint_manager.steps(workdir)):
    return None
  saved, current = read_json(path), json.loads(config.to_json())
  _check_version(path, saved, current)
  saved["model"] = {**default_attributes(), **saved["model"]}
  for key, options in (("schedule", Schedule()), ("gamma", gamma.GammaDensity())):
    saved["objective"][key] = {**dataclasses.asdict(options), **saved["objective"].get(key, {})}
  # What encodes in each step makes the data; with a cache it only decodes samples.
  free = (*FREE, "autoencoder.dtype.") if config.data.source == "latents" else FREE
  differing = [
    f"{name}: {before!r} in the workdir, {now!r} in this config"
    for name, before, now in differences(saved, current)
    if before is not ABSENT and not f"{name}.".startswith(free)
  ]
  if differing:
    raise ValueError(f"{workdir} holds a run with another config: {'; '.join(differing)}. Choose another --workdir")
  return saved


def _check_version(path: str, saved: dict[str, Any], current: dict[str, Any]):
  """Refuses a config with keys that this version does not have."""
  old_keys = [
    name
    for name, _, now in differences(saved, current)
    if now is ABSENT and "." in name and not f"{name}.".startswith(OPTIONAL)
  ]
  if old_keys:
    version = saved.get(VERSION, FIRST_VERSION)
    raise ValueError(
      f"{path} was written by eqm_jax {version}, with keys that this config does not have: {', '.join(old_keys)}. "
      f"Continue with eqm_jax {version}, or choose another --workdir"
    )


class _Absent:
  """The value of a key that a config does not have."""

  def __repr__(self) -> str:
    return "absent"


ABSENT = _Absent()


def differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
  """(path, value in a, value in b) wherever two nested dicts differ; ABSENT for a key that one of them lacks."""
  if isinstance(a, dict) and isinstance(b, dict):
    for key in sorted(a.keys() | b.keys()):
      yield from differences(a.get(key, ABSENT), b.get(key, ABSENT), f"{name}.{key}" if name else key)
  elif a != b:
    yield name, a, b
