"""What modes open: the model, the data set, the autoencoder, and the generator of a section of the config."""

import dataclasses
import os
from collections.abc import Sequence

import ml_collections

from eqm_jax import distributed
from eqm_jax.checkpoints import pretrained
from eqm_jax.data import codec as codec_lib
from eqm_jax.data import sources
from eqm_jax.data.codec import Codec, check_same_autoencoder
from eqm_jax.data.samples import Source
from eqm_jax.equilibrium import objective, sampler
from eqm_jax.networks.dit import DiT
from eqm_jax.sampling.generator import Generator
from eqm_jax.training import state
from eqm_jax.training import validation as training_validation


def load_model(
  config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None, weights: str
) -> pretrained.Pretrained:
  """The model of `checkpoint`, else of the workdir, which then must be of this config.

  Raises:
    ValueError: if there is no model, it is damaged, or the processes do not all see the same step of it.
  """
  if not checkpoint:
    training_validation.check_same_run(workdir, config)
  path = checkpoint or workdir
  model = pretrained.load(path, weights=weights)
  distributed.check_same(f"the step that is loaded from {path}", model.step)
  return model


def open_source(config: ml_collections.ConfigDict) -> Source:
  """The data set of the config."""
  return sources.open_source(config.data.source, {**config.data.options})


def open_images(config: ml_collections.ConfigDict) -> Source:
  """The data set of images; where the model is trained on latents, the images that they were encoded from.

  Raises:
    ValueError: if the config names latents only.
  """
  if "prepare" in config:
    return sources.open_source(config.prepare.source, {**config.prepare.options})
  source = open_source(config)
  if source.autoencoder_id:
    raise ValueError(
      f"evaluation.features = {tuple(config.evaluation.features)} need images, but the data set "
      f"{config.data.source!r} holds latents: name 'raw', give statistics (evaluation.inception.reference, "
      "evaluation.dinov2.reference), or a section `prepare` that names the images"
    )
  return source


def open_decoder(config: ml_collections.ConfigDict, model: pretrained.Pretrained) -> Codec | None:
  """The autoencoder of the config, which must be that of the model's latents; None without one."""
  codec = codec_lib.open_codec(config.autoencoder)
  if codec:
    check_same_autoencoder("the model", model.autoencoder, codec.autoencoder_id)
  return codec


def make_generator(
  config: ml_collections.ConfigDict,
  options: ml_collections.ConfigDict,
  model: DiT,
  params=None,
  decoder: Codec | None = None,
) -> Generator:
  """Generator with the batch size and seed of `options`, a section of the config.

  Without `params` it cannot sample, but check samplers.
  """
  schedule = objective.schedule_of(config.objective)
  return Generator(
    model=model,
    params=params,
    key=state.stream_key(options.seed, "samples"),
    batch_size=options.batch_size,
    multiplier=schedule.multiplier,
    auto_length=sampler.auto_length(schedule),
    decoder=decoder,
  )


def open_generator(
  config: ml_collections.ConfigDict, options: ml_collections.ConfigDict, workdir: str, checkpoint: str | None
) -> tuple[Generator, pretrained.Pretrained]:
  """Generator of the model that `checkpoint`, else the workdir, holds; with the settings of `options`."""
  loaded = load_model(config, workdir, checkpoint, options.weights)
  decoder = open_decoder(config, loaded)
  generator = make_generator(config, options, loaded.model, loaded.params, decoder)
  return with_class_names(generator, loaded.class_names), loaded


def with_class_names(generator: Generator, class_names: Sequence[str] | None) -> Generator:
  """The generator with the names of a data set's classes, where the model's files have none."""
  if generator.class_names is not None or class_names is None or len(class_names) != generator.model.num_classes:
    return generator
  return dataclasses.replace(generator, class_names=class_names)


def directory_of(workdir: str, name: str) -> str:
  """Directory of a mode's files below the workdir, made if it does not exist."""
  directory = os.path.join(workdir, name)
  os.makedirs(directory, exist_ok=True)
  return directory
