"""What an evaluation is asked for: which samplers, what real data it needs, and what is refused before it begins."""

import ml_collections

from eqm_jax import devices
from eqm_jax.data.samples import Source
from eqm_jax.evaluation import features, plane, real, samplers
from eqm_jax.networks.dit import DiT


def check_options(config: ml_collections.ConfigDict, model: DiT, batching: samplers.Batching):
  """Refuses, before anything is read, trained or sampled, settings that cannot be.

  Raises:
    ValueError: naming the key and the value.
  """
  options = config.evaluation
  features.check(options)
  of_images = [name for name in options.features if name in features.OF_IMAGES]
  if of_images and model.input_shape == plane.SHAPE:
    raise ValueError(f"evaluation.features: {of_images[0]!r} looks at images, but the samples are points: use 'raw'")
  if options.samples < 2:
    raise ValueError(f"evaluation.samples = {options.samples}: a distance needs at least 2 samples")
  if options.unit < 1:
    raise ValueError(f"evaluation.unit = {options.unit} must be at least 1")
  if options.labels not in samplers.LABELS:
    raise ValueError(f"evaluation.labels = {options.labels!r} is not one of {', '.join(samplers.LABELS)}")
  if options.npz and model.input_shape == plane.SHAPE:
    raise ValueError("evaluation.npz = True: the samples are points, not images")
  if options.repeats < 1 or not set(options.timed) <= set(rows_of(config)):
    raise ValueError(
      f"evaluation.repeats = {options.repeats} must be at least 1, and evaluation.timed = {options.timed} "
      f"some of the samplers that are evaluated: {', '.join(rows_of(config))}"
    )
  if options.timed and devices.process()[1] > 1:
    raise ValueError(f"evaluation.timed = {options.timed}: speed is compared in one process")
  if "inception" in options.features and options.inception.reference:
    real.check_path(options.inception.reference)
  if options.weights not in ("ema", "model"):
    raise ValueError(f"evaluation.weights = {options.weights!r} is neither 'ema' nor 'model'")
  for name in rows_of(config):
    if name not in config.samplers:
      raise ValueError(f"evaluation.rows: {name!r} is not one of the samplers: {', '.join(config.samplers)}")
    samplers.check(name, config.samplers[name], model, batching)
  check_pictured("evaluation.pictured", options.pictured, config.samplers)


def check_data(
  config: ml_collections.ConfigDict,
  model: DiT,
  source: Source | None,
  images: Source | None,
  batching: samplers.Batching,
):
  """Refuses real data that the samples of a model cannot be compared with.

  Args:
    config: the whole config.
    model: what is sampled.
    source, images: the real samples, and the real images, where `needs` asks for them.
    batching: how samples are drawn and decoded.

  Raises:
    ValueError: naming both.
  """
  if source is not None and (model.input_shape != source.shape or model.num_classes != source.num_classes):
    raise ValueError(
      f"the model makes {model.input_shape} of {model.num_classes} classes, but {config.data.source!r} has "
      f"{source.shape} of {source.num_classes}: they cannot be compared. A model of latents is evaluated against a "
      "cache of them (data.source = 'latents'), or in features of images (evaluation.features)"
    )
  options, shape = config.evaluation, batching.image_shape or model.input_shape
  if "inception" in options.features and shape[2] != 3:
    raise ValueError(
      f"evaluation.features: 'inception' takes RGB images, but the samples are {shape}: "
      "name 'classifier' or 'raw', or, for latents, give the autoencoder.path that decodes them"
    )
  if "classifier" in options.features and images.shape != shape:
    raise ValueError(
      f"evaluation.features: 'classifier' is fitted to images {images.shape}, but the samples are {shape}: "
      "for latents, give the autoencoder.path that decodes them"
    )
  if options.npz and shape[2] not in (1, 3):
    raise ValueError(f"evaluation.npz = True, but the samples are {shape}, no images: give the autoencoder.path")


def rows_of(config: ml_collections.ConfigDict) -> list[str]:
  """The samplers that are evaluated."""
  return list(config.evaluation.rows or config.samplers)


def needs(config: ml_collections.ConfigDict) -> tuple[bool, bool]:
  """Whether real samples, and whether real images, are needed: ADM's statistics make both needless."""
  options, model = config.evaluation, config.model
  in_plane = (model.input_size, model.input_size, model.channels) == plane.SHAPE
  return (
    "raw" in options.features or options.label_agreement or in_plane,
    "classifier" in options.features or ("inception" in options.features and not options.inception.reference),
  )


def check_pictured(key: str, name: str, rows: ml_collections.ConfigDict):
  """Refuses a sampler that cannot be drawn; "none" draws nothing."""
  if name == "none":
    return
  if name not in rows:
    raise ValueError(f"{key} = {name!r} is not one of the samplers: {', '.join(rows)}, or 'none'")
  if not samplers.is_descent(rows[name]):
    raise ValueError(f"{key} = {name!r} integrates; only a descent is drawn: choose another, or 'none'")
