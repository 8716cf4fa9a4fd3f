"""What the tasks work on: the images of `config.tasks`, their labels, and how they descend."""

import dataclasses

import ml_collections
import numpy as np

from eqm_jax.data import images
from eqm_jax.data.sources import Source
from eqm_jax.evaluation import evaluate, sample, samplers
from eqm_jax.networks.dit import DiT


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The images of a task."""

  image_N: np.ndarray  # [N, H, W, C] float32
  label_N: np.ndarray  # [N] int32: the classes that the field is told
  in_pixels: bool  # or latents


def check(config: ml_collections.ConfigDict, model: DiT, batching: samplers.Batching) -> ml_collections.ConfigDict:
  """The row of the sampler that a task descends with.

  Raises:
    ValueError: naming the key, if it is missing or does not descend.
  """
  name = config.tasks.sampler
  evaluate.check_pictured("tasks.sampler", name, config.samplers)
  if name == "none":
    raise ValueError("tasks.sampler = 'none': a task descends; name one of the samplers")
  samplers.check(name, config.samplers[name], model, batching)
  return config.samplers[name]


def open_inputs(options: ml_collections.ConfigDict, source: Source, model: DiT) -> Inputs:
  """The images that `options` (the section tasks) names, and the labels asked for.

  Raises:
    ValueError: naming the key or the file, for what does not fit.
  """
  if options.count < 1:
    raise ValueError(f"tasks.count = {options.count} must be at least 1")
  in_pixels = "image" in source[0]
  if options.images:
    image_N, own_N = images.read(options.images, model.input_shape, options.count, in_pixels)
  else:
    if source.shape != model.input_shape:
      raise ValueError(f"the data set has samples of shape {source.shape}, but the model takes {model.input_shape}")
    image_N, own_N = first_images(source, options.count), source.labels[: options.count]
  if options.labels == "own":
    if own_N is None:
      raise ValueError(f"tasks.labels = 'own', but {options.images} has no labels: give 'none' or a list")
    label_N = own_N
  else:
    label_N = sample.parse_labels("tasks.labels", options.labels, len(image_N), model.num_classes)
  return Inputs(image_N, label_N, in_pixels)


def first_images(source: Source, count: int) -> np.ndarray:
  """The first images of a data set, [N, H, W, C]."""
  return np.stack([evaluate.real_sample(source[i]) for i in range(min(count, len(source)))])


def mean_square(a: np.ndarray, b: np.ndarray) -> float:
  """The mean squared difference of two sets of images."""
  return float(np.mean((a - b) ** 2))
