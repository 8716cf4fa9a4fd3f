"""What denoise, ood, compose and inpaint share: a task with its generator, sampler, images and labels."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from eqm_jax import plotting
from eqm_jax.checks import at_least, one_of
from eqm_jax.data import arrays, images, samples
from eqm_jax.data.codec import check_same_autoencoder
from eqm_jax.data.samples import Source
from eqm_jax.equilibrium import sampler
from eqm_jax.equilibrium.field import check_labels
from eqm_jax.evaluation import plane, reference_data
from eqm_jax.io import write_json
from eqm_jax.modes import common
from eqm_jax.sampling import generator as generator_lib
from eqm_jax.sampling import labels
from eqm_jax.sampling.generator import Generator

COLUMNS = 12  # images of each kind in a picture


@dataclasses.dataclass(frozen=True)
class Task:
  """An application of a landscape, opened by `open_task`."""

  name: str
  config: ml_collections.ConfigDict
  generator: Generator
  autoencoder_id: dict[str, str] | None  # of the model's latents
  source: Source  # the data set
  directory: str  # of the results

  @property
  def options(self) -> ml_collections.ConfigDict:
    """The section tasks of the config."""
    return self.config.tasks

  def row(self, stops: Sequence[str] = sampler.STOPS) -> ml_collections.ConfigDict:
    """The sampler that the task descends with.

    Args:
      stops: what its samples may stop by.

    Raises:
      ValueError: naming the key, if it does not exist, does not descend, or does not fit the task or the model.
    """
    if self.generator.model.time_input:
      raise ValueError(
        f"--mode={self.name} needs a field without time input, but the model has model.time_input = True: "
        "give another --checkpoint"
      )
    descents = [name for name, row in self.config.samplers.items() if generator_lib.is_descent(row)]
    one_of("tasks.sampler", self.options.sampler, descents, "it names a sampler that descends")
    row = self.config.samplers[self.options.sampler]
    one_of(f"samplers.{self.options.sampler}.stop", row.stop, stops, f"--mode={self.name} takes no other")
    self.generator.check(self.options.sampler, row)
    return row

  def real(self, count: int) -> np.ndarray:
    """Evenly spaced samples of the data set, at most `count`: [N, H, W, C].

    Raises:
      ValueError: if they do not have the shape of the model's samples.
    """
    return self.real_and_labels(count)[0]

  def real_and_labels(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`real`, and the labels [N]."""
    shape = self.generator.model.input_shape
    if self.source.shape != shape:
      raise ValueError(
        f"data.source = {self.config.data.source!r} has samples of shape {self.source.shape}, but the model takes "
        f"{shape}: give the data set that it was trained on"
      )
    chosen = samples.spread(self.source, count)
    return samples.arrays_and_labels(self.source, chosen, self.config.data.threads)

  def inputs(self, noisy: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The images [N, H, W, C] and labels [N] of the task: of `tasks.images`, or evenly spaced ones of the data set.

    Args:
      noisy: whether images may lie far outside [−1, 1], because there is noise in them.

    Raises:
      ValueError: naming the key or the file, if they do not fit the model.
    """
    options = self.options
    decoding = {"upright": options.upright, "background": options.background}
    if options.images is not None:
      in_pixels, bounded = self.source.autoencoder_id is None, reference_data.is_pixels(self.source) and not noisy
      shape = self.generator.model.input_shape
      image_N, own_N = images.read(options.images, shape, options.num_images, in_pixels, bounded, **decoding)
      if not in_pixels:
        check_same_autoencoder(options.images, arrays.recorded_autoencoder(options.images), self.autoencoder_id)
    else:
      image_N, own_N = self.real_and_labels(options.num_images)
    return image_N, self._labels(own_N, len(image_N))

  def _labels(self, own_N: np.ndarray | None, count: int) -> np.ndarray:
    num_classes, spec = self.generator.model.num_classes, self.options.labels
    if spec != "own":
      return labels.parse("tasks.labels", spec, count, num_classes, seed=self.options.seed)
    if own_N is None:
      raise ValueError(
        f"tasks.labels = 'own', but {self.options.images} has no labels: give 'none', 'balanced', or a list"
      )
    check_labels(own_N, num_classes)
    return own_N.astype(np.int32)

  def write(self, report: dict[str, Any], picture: Image.Image, npz: str, arrays: dict[str, np.ndarray]):
    """Writes NAME.json, NAME.png, and the arrays (with the autoencoder of latents) into a file called `npz`."""
    os.makedirs(self.directory, exist_ok=True)
    path = os.path.join(self.directory, self.name)
    np.savez(os.path.join(self.directory, npz), **arrays, autoencoder=self.generator.autoencoder_id)
    picture.save(f"{path}.png")
    write_json(f"{path}.json", report)

  def picture(self, rows: list[np.ndarray], captions: Sequence[str] | None = None) -> Image.Image:
    """Rows of images below each other, the first of each, latents decoded; or diagrams of points.

    Args:
      rows: [N, H, W, C] each.
      captions: below the images, as `plotting.grid` takes them.
    """
    if rows[0].shape[1:] == plane.SHAPE:
      return _side_by_side([plane.scatter(row) for row in rows])
    pixels = self.generator.pixels(np.concatenate([row[:COLUMNS] for row in rows]))
    return plotting.grid(pixels, min(COLUMNS, len(rows[0])), captions=captions)


def open_task(name: str, config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None) -> Task:
  """Opens model, data set and decoder for the mode `name`.

  Raises:
    ValueError: if an option is out of range, or they do not fit each other.
  """
  at_least("tasks.num_images", config.tasks.num_images, 1)
  at_least("tasks.batch_size", config.tasks.batch_size, 1)
  one_of("tasks.background", config.tasks.background, images.BACKGROUNDS)
  generator, model = common.open_generator(config, config.tasks, workdir, checkpoint)
  source = common.open_source(config)
  check_same_autoencoder("the model", model.autoencoder, source.autoencoder_id)
  generator = common.with_class_names(generator, source.class_names)
  return Task(name, config, generator, model.autoencoder, source, os.path.join(workdir, name))


def mean_square(a: np.ndarray, b: np.ndarray) -> float:
  """Mean squared difference of two sets of images."""
  return float(np.mean((a - b) ** 2))


def _side_by_side(diagrams: list[Image.Image]) -> Image.Image:
  strip = Image.new("RGB", (sum(diagram.width for diagram in diagrams), diagrams[0].height))
  for position, diagram in enumerate(diagrams):
    strip.paste(diagram, (position * diagram.width, 0))
  return strip
