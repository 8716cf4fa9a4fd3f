"""Mode train: training to the end, then an evaluation."""

import dataclasses
import logging

import ml_collections

from eqm_jax.data import codec as codec_lib
from eqm_jax.evaluation import validation
from eqm_jax.modes import Mode, common, evaluate, prepare
from eqm_jax.networks.dit import DiT
from eqm_jax.training import periodic_evaluation, train

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str):
  """Trains to `train.steps`, resuming where the workdir has checkpoints, and evaluates the result.

  Where the config has a section `prepare`, its cache of latents is encoded first.

  Raises:
    ValueError: before any work, if the config does not fit; `evaluation` included.
    FloatingPointError: if the loss stops being finite.
    OSError: if a checkpoint cannot be written.
  """
  model = DiT(**config.model)
  evaluates = config.evaluation.num_samples is not None
  if evaluates:  # mistakes are found before anything takes long
    validation.check_before_training(config)
    untrained = common.make_generator(config, config.evaluation, model)
    validation.check_options(config, untrained)
    periodic_evaluation.check(config, untrained)
  else:
    log.info("evaluation.num_samples = None: no evaluation, neither during training nor after it")
  train.check(config, workdir)
  if "prepare" in config:
    prepare.prepare(config)
  codec = codec_lib.open_codec(config.autoencoder)
  if not evaluates:
    train.train(config, workdir, codec)
    return
  generator = common.make_generator(config, config.evaluation, model, decoder=codec)
  reference = evaluate.open_reference(config, generator)
  generator = common.with_class_names(generator, reference.class_names)
  if train.train(config, workdir, codec, reference=reference, generator=generator):
    trained = common.load_model(config, workdir, None, config.evaluation.weights)
    generator = dataclasses.replace(generator, model=trained.model, params=trained.params)
    evaluate.write_evaluation(config, workdir, generator, reference, evaluate.origin_of(trained, None))


MODE = Mode(
  name="train",
  summary="Trains a model, resuming where it was stopped, and evaluates it at the end.",
  writes=(
    "config.json, environment.json, checkpoints/, metrics.jsonl, tensorboard/, best.json, best.png, report.html; "
    "evaluate's files"
  ),
  run=run,
  checkpoint="none",
  processes="many",
  checkpoint_hint=(
    "training resumes from its workdir, and starts from other weights with --config.train.init_from=PATH"
  ),
)
