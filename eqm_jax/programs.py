"""What each --mode does: opens config, data and model, and hands them to the package that works on them."""

import logging
import os

import ml_collections

from eqm_jax.data import sources
from eqm_jax.evaluation import evaluate, sample, samplers
from eqm_jax.networks.dit import DiT
from eqm_jax.training import pretrained, sharding, state, train

log = logging.getLogger(__name__)


def run(mode: str, config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None):
  """Runs one mode.

  Args:
    mode: "train" (and then evaluate), "evaluate" or "sample".
    config: of configs/.
    workdir: of the run.
    checkpoint: the model to evaluate or sample, if not the workdir's.

  Raises:
    ValueError: before any work, for what does not fit.
    FloatingPointError: if training diverges.
  """
  {"train": _train, "evaluate": _evaluate, "sample": _sample}[mode](config, workdir, checkpoint)


def _train(config, workdir, checkpoint):
  if checkpoint:
    raise ValueError(f"--checkpoint={checkpoint} is for --mode=evaluate and sample; training starts in its workdir")
  if config.evaluation.samples:  # a mistake in the evaluation is told before the training
    evaluate.check(config, DiT(**config.model), _source(config), _batching(config, config.evaluation))
  finished = train.train(config, workdir)
  if finished and config.evaluation.samples:
    _evaluate(config, workdir, None)


def _evaluate(config, workdir, checkpoint):
  source, batching = _source(config), _batching(config, config.evaluation)
  model = _load(config, workdir, checkpoint, config.evaluation.weights)
  directory = os.path.join(workdir, "evaluation")
  evaluate.evaluate(config, model.model, model.params, source, batching, directory)
  log.info("figures and pictures: %s", directory)


def _sample(config, workdir, checkpoint):
  model = _load(config, workdir, checkpoint, config.sample.weights)
  directory = os.path.join(workdir, "samples")
  sample.sample(config, model.model, model.params, _batching(config, config.sample), directory)
  log.info("samples: %s", directory)


def _load(config, workdir, checkpoint, weights) -> pretrained.Pretrained:
  """The model of the checkpoint, or of the workdir, which then must be of this config."""
  if not checkpoint:
    train.check_same_run(workdir, config)
  return pretrained.load(checkpoint or workdir, weights=weights)


def _source(config) -> sources.Source:
  return sources.open_source(config.data.source, {**config.data.options})


def _batching(config, options) -> samplers.Batching:
  equilibrium = config.objective.kind == "equilibrium"
  return samplers.Batching(
    mesh=sharding.make_mesh(**config.mesh),
    batch_size=options.batch_size,
    key=state.stream_key(options.seed, "samples"),
    multiplier=config.objective.schedule.multiplier if equilibrium else 1.0,
  )
