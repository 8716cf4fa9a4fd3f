"""What is refused before a run begins: a config that does not fit, and a workdir of another run."""

import json
import os
from collections.abc import Iterator
from typing import Any

import ml_collections

from eqm_jax.data.codec import Codec, check_same_autoencoder
from eqm_jax.data.samples import Source
from eqm_jax.equilibrium import energy
from eqm_jax.files import read_json
from eqm_jax.networks.dit import DiT
from eqm_jax.training import checkpoint, pretrained

# What may differ between a run and its continuation: it does not touch the parameters (any more), or is checked
# elsewhere: that the data set is as long as it was, and that the latents are of the same autoencoder.
FREE = (
  "autoencoder.batch_size.",
  "autoencoder.name.",
  "autoencoder.path.",
  "autoencoder.sha256.",
  "benchmark.",
  "checkpoint.",
  "data.options.path.",
  "data.options.verify.",
  "data.samples.",
  "data.threads.",
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
  "train.accumulate.",
  "train.init_from.",
  "train.log_every.",
  "train.profile.",
)

NO_GRADIENT = (
  "where the energy ½‖f‖² has no gradient in any parameter. Warm-start from a trained implicit model "
  "(model.energy = 'none', otherwise the same) with train.init_from = its workdir"
)


def check_fits(
  config: ml_collections.ConfigDict,
  model: DiT,
  source: Source,
  codec: Codec | None,
  identity: dict[str, Any] | None,
):
  """Refuses, before anything is compiled, a config whose parts do not fit each other or the data.

  Args:
    config: the whole config.
    model: what is trained.
    source: the data set.
    codec: what encodes its images in each step, if something does.
    identity: of the autoencoder whose latents are trained on; None for pixels.

  Raises:
    ValueError: naming the key and the value.
  """
  shape = codec.latent_shape(source.shape) if codec else source.shape
  if shape != model.input_shape:
    raise ValueError(
      f"data.source {config.data.source!r} has samples of shape {shape}, but the model takes "
      f"{model.input_shape}: set model.input_size and model.channels"
    )
  wanted = config.autoencoder
  if identity and (identity["name"] != wanted.name or wanted.sha256 not in ("", identity["sha256"])):
    raise ValueError(
      f"autoencoder.name = {wanted.name!r} and autoencoder.sha256 = {wanted.sha256!r}, but {config.data.source!r} has "
      f"latents of {identity['name']!r}, sha256 {identity['sha256']}"
    )
  if source.num_classes != model.num_classes:
    raise ValueError(
      f"model.num_classes = {model.num_classes}, but {config.data.source!r} has {source.num_classes} classes"
    )
  if config.objective.kind not in ("equilibrium", "flow_matching"):
    raise ValueError(f"objective.kind = {config.objective.kind!r} is neither 'equilibrium' nor 'flow_matching'")
  if config.objective.kind == "equilibrium" and model.time_input:
    raise ValueError("objective.kind = 'equilibrium' trains a field without time: set model.time_input = False")
  if not 0 <= config.objective.label_dropout <= 1:
    raise ValueError(f"objective.label_dropout = {config.objective.label_dropout} must lie in [0, 1]")
  if not 0 <= config.objective.clean_share < 1:
    raise ValueError(f"objective.clean_share = {config.objective.clean_share} must lie in [0, 1)")
  _check_energy(config, model)
  if config.train.accumulate > 1 and config.objective.dispersive_weight:
    raise ValueError(
      f"train.accumulate = {config.train.accumulate} splits the batch, but the dispersive loss is of all its pairs: "
      "set objective.dispersive_weight = 0 or train.accumulate = 1"
    )
  if not 0 <= config.optimizer.ema_decay < 1:
    raise ValueError(f"optimizer.ema_decay = {config.optimizer.ema_decay} must lie in [0, 1)")
  counts = {
    "train.steps": config.train.steps,
    "train.batch_size": config.train.batch_size,
    "train.accumulate": config.train.accumulate,
    "train.log_every": config.train.log_every,
    "checkpoint.every": config.checkpoint.every,
    "checkpoint.keep": config.checkpoint.keep,
    "data.threads": config.data.threads,
  }
  for name, value in counts.items():
    if value < 1:
      raise ValueError(f"{name} = {value} must be at least 1")


def _check_energy(config: ml_collections.ConfigDict, model: DiT):
  if config.objective.second_order not in energy.SECOND_ORDER:
    known = ", ".join(energy.SECOND_ORDER)
    raise ValueError(f"objective.second_order = {config.objective.second_order!r} is not one of {known}")
  if model.energy != "none" and config.objective.kind != "equilibrium":
    raise ValueError(f"model.energy = {model.energy!r} needs objective.kind = 'equilibrium'")
  if model.energy != "none" and config.objective.dispersive_weight:
    raise ValueError("objective.dispersive_weight is for implicit fields: set it to 0 or model.energy = 'none'")
  if model.energy == "l2" and not config.train.init_from:
    raise ValueError(f"model.energy = 'l2' starts from an output layer of zeros, {NO_GRADIENT}")


def check_same_run(
  workdir: str,
  config: ml_collections.ConfigDict,
  identity: dict[str, Any] | None = None,
  samples: int | None = None,
):
  """Refuses a workdir whose checkpoints were trained with another config, autoencoder, or length of the data set.

  A key that the older config lacks was added since, with a default that changes nothing.
  """
  path = os.path.join(workdir, pretrained.CONFIG)
  if not (os.path.exists(path) and checkpoint.steps(workdir)):
    return
  there = read_json(path)
  # What encodes in each step makes the data; with a cache it only decodes samples.
  free = (*FREE, "autoencoder.dtype.") if config.data.source == "latents" else FREE
  check_same_autoencoder(workdir, pretrained.recorded_autoencoder(there), identity)
  found = [
    f"{name}: {was!r} there, {now!r} given"
    for name, was, now in differences(there, json.loads(config.to_json()))
    if was is not None and not f"{name}.".startswith(free)
  ]
  if found:
    raise ValueError(f"{workdir} holds a run with another config: {'; '.join(found)}. Choose another --workdir")
  seen = there["data"].get("samples", samples)
  if samples is not None and seen != samples:
    raise ValueError(
      f"{workdir} was trained on {seen} samples, but the data set has {samples}. Choose another --workdir"
    )


def differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
  """(path, value in a, value in b) wherever two nested dicts differ."""
  if isinstance(a, dict) and isinstance(b, dict):
    for key in sorted(a.keys() | b.keys()):
      yield from differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
  elif a != b:
    yield name, a, b
