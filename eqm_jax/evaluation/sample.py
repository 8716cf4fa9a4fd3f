"""Draws samples from a model into files: a grid, and on request single images and an npz."""

import logging
import os
import re
from typing import Any

import ml_collections
import numpy as np

from eqm_jax.equilibrium.labels import checked_labels
from eqm_jax.evaluation import paths, pictures, plane, samplers
from eqm_jax.networks.dit import DiT

log = logging.getLogger(__name__)


def sample(
  config: ml_collections.ConfigDict, model: DiT, params: Any, batching: samplers.Batching, directory: str
) -> samplers.Drawn:
  """Draws what `config.sample` asks for.

  Writes samples.png (the first hundred); with `images` one PNG a sample, under
  images/; with `npz` samples.npz with x, of latents also the decoded image (uint8) and the autoencoder, label,
  evaluations, norm, status and restarts; and the way of the first samples, if the sampler descends.

  Raises:
    ValueError: before sampling, if the config does not fit.
  """
  options = config.sample
  if options.sampler not in config.samplers:
    raise ValueError(f"sample.sampler = {options.sampler!r} is not one of the samplers: {', '.join(config.samplers)}")
  row = config.samplers[options.sampler]
  samplers.check(options.sampler, row, model, batching)
  label_N = parse_labels("sample.labels", options.labels, options.count, model.num_classes)
  os.makedirs(directory, exist_ok=True)

  drawn = samplers.draw(options.sampler, row, model, params, label_N, batching)
  rate, evaluations = len(label_N) / drawn.seconds, drawn.result.evaluations_B
  log.info("%d images, %.1f images/s, %.1f evaluations an image", len(label_N), rate, evaluations.mean())
  shown = drawn.result.x if options.images or options.npz else drawn.result.x[:100]
  pixels = batching.pixels(shown)
  if model.input_shape == plane.SHAPE:
    plane.scatter(drawn.result.x).save(os.path.join(directory, "samples.png"))
  else:
    pictures.grid(pixels[:100], 10).save(os.path.join(directory, "samples.png"))
  if options.images:
    os.makedirs(os.path.join(directory, "images"), exist_ok=True)
    for i, (image, label) in enumerate(zip(pixels, label_N)):
      pictures.single(image).save(os.path.join(directory, "images", f"{i:06d}_{label}.png"))
  if options.npz:
    result = drawn.result
    np.savez(
      os.path.join(directory, "samples.npz"),
      x=result.x,
      **({"image": pixels, "autoencoder": batching.autoencoder} if batching.decode else {}),
      label=label_N,
      evaluations=evaluations,
      norm=result.norm_B,
      status=result.status_B,
      restarts=result.restarts_B,
    )
  if samplers.is_descent(row) and model.input_shape != plane.SHAPE:
    paths.draw(row, model, params, label_N[:10], batching, directory)
  return drawn


def parse_labels(key: str, text: str, count: int, num_classes: int) -> np.ndarray:
  """The labels of `count` samples, int32.

  Args:
    key: where the text comes from, for errors.
    text: "balanced" (every class in turn), "none" (no class), or labels and ranges
      such as "3", "0-4" or "1,5,7-9", in turn.
    count: how many.
    num_classes: of the model.

  Raises:
    ValueError: if the text is none of these, or a label is not known.
  """
  if count < 1:
    raise ValueError(f"{key}: the number of samples, {count}, must be at least 1")
  if text == "balanced":
    return samplers.balanced_labels(count, num_classes)
  if text == "none":
    return np.full(count, num_classes, np.int32)
  labels: list[int] = []
  for part in str(text).split(","):
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
    if not match or (match[2] and int(match[2]) < int(match[1])):
      raise ValueError(f"{key} = {text!r}: {part!r} is no label and no range; give 'balanced', 'none', or '1,5,7-9'")
    labels += range(int(match[1]), int(match[2] or match[1]) + 1)
  checked_labels(np.asarray(labels), num_classes)
  return np.resize(np.asarray(labels, np.int32), count)
