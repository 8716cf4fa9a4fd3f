"""What the tasks work on: the images of `config.tasks`, their labels, and how they descend."""

import dataclasses

import ml_collections
import numpy as np
from PIL import Image

from eqm_jax.data import images
from eqm_jax.data.samples import Source
from eqm_jax.equilibrium.labels import checked_labels
from eqm_jax.evaluation import pictures, plane, real, sample, samplers
from eqm_jax.networks.dit import DiT


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The images of a task."""

  image_N: np.ndarray  # [N, H, W, C] float32
  label_N: np.ndarray  # [N] int32: the classes that the field is told


def check_options(options: ml_collections.ConfigDict):
  """Refuses numbers of the section tasks that no task can work with.

  Raises:
    ValueError: naming the key and the value.
  """
  if options.count < 1:
    raise ValueError(f"tasks.count = {options.count} must be at least 1")
  if options.batch_size < 1:
    raise ValueError(f"tasks.batch_size = {options.batch_size} must be at least 1")


def check(config: ml_collections.ConfigDict, model: DiT, batching: samplers.Batching) -> ml_collections.ConfigDict:
  """The row of the sampler that a task descends with.

  Raises:
    ValueError: naming the key, if it is missing or does not descend.
  """
  name = config.tasks.sampler
  if model.time_input:
    raise ValueError("a task needs a field without time, but this model is told the time (model.time_input)")
  if name not in config.samplers or not samplers.is_descent(config.samplers[name]):
    known = ", ".join(name for name, row in config.samplers.items() if samplers.is_descent(row)) or "none here"
    raise ValueError(f"tasks.sampler = {name!r} is not one of the samplers that descend: {known}")
  samplers.check(name, config.samplers[name], model, batching)
  return config.samplers[name]


def open_inputs(options: ml_collections.ConfigDict, source: Source, model: DiT, noisy: bool) -> Inputs:
  """The images that `options` (the section tasks) names, and the labels asked for.

  `noisy`: they may lie far outside [−1, 1], since there is noise in them.

  Raises:
    ValueError: naming the key or the file, for what does not fit.
  """
  if options.images:
    in_pixels, bounded = "image" in source[0], real.is_pixels(source) and not noisy
    image_N, own_N = images.read(options.images, model.input_shape, options.count, in_pixels, bounded)
  else:
    if source.shape != model.input_shape:
      raise ValueError(f"the data set has samples of shape {source.shape}, but the model takes {model.input_shape}")
    samples = [source[i] for i in range(min(options.count, len(source)))]
    image_N = np.stack([real.sample_array(sample) for sample in samples])
    own_N = np.asarray([sample["label"] for sample in samples])
  if options.labels == "own":
    if own_N is None:
      raise ValueError(f"tasks.labels = 'own', but {options.images} has no labels: give 'none' or a list")
    label_N = own_N
  else:
    label_N = sample.parse_labels("tasks.labels", options.labels, len(image_N), model.num_classes)
  return Inputs(image_N, np.asarray(checked_labels(label_N, model.num_classes)))


def first_images(source: Source, count: int) -> np.ndarray:
  """The first images of a data set, [N, H, W, C]."""
  return np.stack([real.sample_array(source[i]) for i in range(min(count, len(source)))])


def show(rows: list[np.ndarray], columns: int, batching: samplers.Batching) -> Image.Image:
  """Rows of images under each other, the first `columns` of each; of points of the plane, a diagram for each row;
  of latents, what they decode to."""
  if rows[0].shape[1:] != plane.SHAPE:
    return pictures.grid(batching.pixels(np.concatenate([row[:columns] for row in rows])), min(columns, len(rows[0])))
  diagrams = [plane.scatter(row) for row in rows]
  strip = Image.new("RGB", (sum(one.width for one in diagrams), diagrams[0].height))
  for place, one in enumerate(diagrams):
    strip.paste(one, (place * one.width, 0))
  return strip


def mean_square(a: np.ndarray, b: np.ndarray) -> float:
  """The mean squared difference of two sets of images."""
  return float(np.mean((a - b) ** 2))
