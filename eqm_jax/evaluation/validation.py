"""Checks of an evaluation's settings and data, before anything is read, trained or sampled."""

import ml_collections

from eqm_jax import distributed
from eqm_jax.checks import at_least, one_of
from eqm_jax.data.samples import Source
from eqm_jax.evaluation import features, plane, reference_data
from eqm_jax.sampling import generator as generator_lib
from eqm_jax.sampling import labels
from eqm_jax.sampling.generator import Generator

WEIGHTS = ("ema", "model")


def check_options(config: ml_collections.ConfigDict, generator: Generator):
  """Refuses settings that cannot be evaluated; the generator needs no parameters yet.

  Raises:
    ValueError: naming the key and the value.
  """
  options, samplers, in_plane = config.evaluation, evaluated_samplers(config), _in_plane(generator.model.input_shape)
  features.check(options)
  from_images = [name for name in options.features if name in features.IMAGE_FEATURES]
  if from_images and in_plane:
    raise ValueError(
      f"evaluation.features = {from_images[0]!r} is computed from images, but the samples are points: use 'raw'"
    )
  at_least("evaluation.num_samples", options.num_samples, 2, "a distance needs two samples")
  at_least("evaluation.chunk_size", options.chunk_size, 1)
  at_least("evaluation.batch_size", options.batch_size, 1)
  _check_labels(options, generator.model.num_classes)
  one_of("evaluation.weights", options.weights, WEIGHTS)
  at_least("evaluation.benchmark_repeats", options.benchmark_repeats, 1)
  if options.save_npz and in_plane:
    raise ValueError("evaluation.save_npz = True must be False: the samples are points, not images")
  for name in options.benchmark_samplers:
    one_of("evaluation.benchmark_samplers", name, samplers, "name evaluated samplers")
  if options.benchmark_samplers and distributed.process_index_and_count()[1] > 1:
    raise ValueError(
      f"evaluation.benchmark_samplers = {options.benchmark_samplers} must be empty in a run of several processes: "
      "speed is compared in one"
    )
  for name, path in features.references(options).items():
    reference_data.check_path(name, path)
  if not samplers:
    raise ValueError("evaluation.samplers = () must name at least one of the samplers, or be None for all of them")
  for name in samplers:
    one_of("evaluation.samplers", name, config.samplers)
    generator.check(name, config.samplers[name])
  _check_plot_sampler(config, generator)


def check_before_training(config: ml_collections.ConfigDict):
  """Refuses evaluated samplers that stop by a read-out, which no weights that are still to be trained can have.

  Raises:
    ValueError: naming the sampler.
  """
  options = config.evaluation
  uses = [("samplers", name) for name in evaluated_samplers(config)]
  uses += [("during_training.sampler", options.during_training.sampler)] * (options.during_training.every is not None)
  uses += [("plot_sampler", options.plot_sampler)] * (options.plot_sampler is not None)
  for name in dict.fromkeys(name for _, name in uses):
    if name in config.samplers and generator_lib.stops_by_gamma(config.samplers[name]):
      keys = " and ".join(f"evaluation.{key}" for key, used in uses if used == name)
      raise ValueError(
        f"samplers.{name}.stop = 'gamma' needs a read-out of weights that are still to be trained: name another "
        f"sampler in {keys}, and evaluate this one afterwards, by --mode=readout and --mode=evaluate"
      )


def check_data(config: ml_collections.ConfigDict, generator: Generator, source: Source | None, images: Source | None):
  """Refuses real data that samples of the model cannot be compared with.

  Args:
    config: the whole config.
    generator: the model to sample from; it needs no parameters yet.
    source: real samples, where `needs` asks for them.
    images: real images, where `needs` asks for them.

  Raises:
    ValueError: naming both.
  """
  model, options, shape = generator.model, config.evaluation, generator.image_shape
  if source is not None and (model.input_shape != source.shape or model.num_classes != source.num_classes):
    raise ValueError(
      f"the model makes {model.input_shape} of {model.num_classes} classes, but {config.data.source!r} has "
      f"{source.shape} of {source.num_classes}: they cannot be compared. A model of latents is evaluated against a "
      "cache of them (data.source = 'latents'), or in features of images (evaluation.features)"
    )
  for name in features.published(options):
    smallest = features.PUBLISHED[name].smallest
    if shape[2] != 3 or min(shape[:2]) < smallest:
      size = f" of at least {smallest} × {smallest} pixels" if smallest > 1 else ""
      raise ValueError(
        f"evaluation.features: {name!r} takes RGB images{size}, but the samples are {shape}: "
        "name 'classifier' or 'raw', or, for latents, give the autoencoder.path that decodes them"
      )
  if "classifier" in options.features and images.shape != shape:
    raise ValueError(
      f"evaluation.features: 'classifier' is fitted to images {images.shape}, but the samples are {shape}: "
      "for latents, give the autoencoder.path that decodes them"
    )
  if options.save_npz and shape[2] not in (1, 3):
    raise ValueError(
      f"evaluation.save_npz = True needs images, but the samples are {shape}: give the autoencoder.path that decodes "
      "them"
    )


def evaluated_samplers(config: ml_collections.ConfigDict) -> list[str]:
  """Names of the samplers to evaluate."""
  chosen = config.evaluation.samplers
  return list(config.samplers if chosen is None else chosen)


def needs(config: ml_collections.ConfigDict) -> tuple[bool, bool]:
  """Whether real samples and whether real images are needed: ADM's statistics make both unnecessary."""
  options, model = config.evaluation, config.model
  in_plane = _in_plane((model.input_size, model.input_size, model.channels))
  return (
    "raw" in options.features or options.classifier_accuracy or in_plane,
    "classifier" in options.features or len(features.references(options)) < len(features.published(options)),
  )


def _check_plot_sampler(config: ml_collections.ConfigDict, generator: Generator):
  """Refuses a sampler whose trajectories cannot be plotted; None plots nothing."""
  key, name = "evaluation.plot_sampler", config.evaluation.plot_sampler
  if name is None:
    return
  one_of(key, name, config.samplers, "or None, to plot nothing")
  row = config.samplers[name]
  if not generator_lib.is_descent(row):
    raise ValueError(f"{key} = {name!r} must descend, but integrates: choose another sampler, or None")
  if _in_plane(generator.model.input_shape) and generator_lib.stops_by_gamma(row):
    raise ValueError(
      f"{key} = {name!r} stops by a read-out, which the optimal field beside it does not have: choose a sampler with "
      "stop = 'norm', or None"
    )
  generator.check(name, row)


def _check_labels(options: ml_collections.ConfigDict, num_classes: int):
  labels.parse("evaluation.labels", options.labels, options.num_samples, num_classes, seed=options.seed)
  if options.labels == "none" and options.classifier_accuracy:
    raise ValueError(
      "evaluation.classifier_accuracy = True compares with the requested classes, but evaluation.labels = 'none' "
      "requests no class: set evaluation.classifier_accuracy = False"
    )


def _in_plane(shape: tuple[int, int, int]) -> bool:
  return shape == plane.SHAPE
