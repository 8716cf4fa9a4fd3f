"""What each --mode does: opens config, data and model, and hands them to the package that works on them."""

import logging
import os

import ml_collections

from eqm_jax.data import sources
from eqm_jax.data.codec import check_same_autoencoder
from eqm_jax.data.samples import Source
from eqm_jax.evaluation import evaluate, sample, samplers
from eqm_jax.networks.dit import DiT
from eqm_jax.report import report
from eqm_jax.tasks import compose, denoise, inpaint, inputs, ood
from eqm_jax.training import benchmark, checks, prepare, pretrained, sharding, state, train

log = logging.getLogger(__name__)


def run(mode: str, config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None):
  """Runs one mode.

  Args:
    mode: "prepare" (encode images into a cache of latents), "train" (prepare, if that is to do, and
      evaluate at the end), "evaluate", "sample", a task ("denoise", "ood",
      "compose", "inpaint"), "report", or "benchmark" (of the data and the training step).
    config: of configs/.
    workdir: of the run.
    checkpoint: the model to use, if not the workdir's; "train" and "report" make theirs.

  Raises:
    ValueError: before any work, for what does not fit.
    FloatingPointError: if training diverges.
  """
  modes = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "sample": _sample,
    "denoise": _denoise,
    "ood": _ood,
    "compose": _compose,
    "inpaint": _inpaint,
    "report": _report,
    "benchmark": _benchmark,
  }
  modes[mode](config, workdir, checkpoint)


def _train(config, workdir, checkpoint):
  if checkpoint:
    raise ValueError(
      f"--checkpoint={checkpoint} is for the modes that use a model; training resumes in its workdir, "
      "and starts from other weights with --config.train.init_from"
    )
  if "prepare" in config:
    prepare.prepare(config)
  codec = pretrained.open_codec(config.autoencoder)
  if config.evaluation.samples:  # a mistake in the evaluation is told before the training
    evaluate.check(config, DiT(**config.model), _source(config), _batching(config, config.evaluation))
  finished = train.train(config, workdir, codec)
  if finished and config.evaluation.samples:
    _evaluate(config, workdir, None)


def _prepare(config, workdir, checkpoint):
  if checkpoint:
    raise ValueError(f"--checkpoint={checkpoint}: preparing data needs no model; give --config.autoencoder.path")
  if "prepare" not in config:
    raise ValueError("this config has no section `prepare`: its data set is read as it is")
  prepare.prepare(config, verify=True)


def _evaluate(config, workdir, checkpoint):
  model, source = _load(config, workdir, checkpoint, config.evaluation.weights), _source(config)
  check_same_autoencoder("the model", model.autoencoder, source.autoencoder)
  batching = _batching(config, config.evaluation, model)
  directory = os.path.join(workdir, "evaluation")
  evaluate.evaluate(config, model.model, model.params, source, batching, directory)
  log.info("figures and pictures: %s", directory)


def _sample(config, workdir, checkpoint):
  model = _load(config, workdir, checkpoint, config.sample.weights)
  directory = os.path.join(workdir, "samples")
  sample.sample(config, model.model, model.params, _batching(config, config.sample, model), directory)
  log.info("samples: %s", directory)


def _denoise(config, workdir, checkpoint):
  model, given, _, batching = _task(config, workdir, checkpoint, noisy=not config.tasks.denoise.gammas)
  directory = os.path.join(workdir, "denoise")
  denoise.denoise(config, model.model, model.params, given, batching, directory)
  log.info("denoised images: %s", directory)


def _ood(config, workdir, checkpoint):
  model, given, source, batching = _task(config, workdir, checkpoint)
  directory = os.path.join(workdir, "ood")
  found = ood.ood(config, model.model, model.params, given, source, batching, directory)
  for score, against in found["auroc"].items():
    log.info("AUROC by %s: %s", score, "  ".join(f"{kind} {value:.3f}" for kind, value in against.items()))
  log.info("scores: %s", directory)


def _compose(config, workdir, checkpoint):
  model = _load(config, workdir, checkpoint, config.tasks.weights)
  options, batching = config.tasks.compose, _batching(config, config.tasks, model)
  inputs.check_options(config.tasks, batching)
  compose.check(options, model.model)
  terms = []
  for path, label, weight in zip(options.checkpoints, options.labels, options.weights):
    part = pretrained.load(path, weights=config.tasks.weights) if path else model
    if part.model.input_shape != model.model.input_shape or part.model.num_classes != model.model.num_classes:
      raise ValueError(
        f"tasks.compose.checkpoints: {path} makes {part.model.input_shape} of {part.model.num_classes} classes, but "
        f"the model {model.model.input_shape} of {model.model.num_classes}: they cannot be added"
      )
    check_same_autoencoder(f"tasks.compose.checkpoints: {path}", part.autoencoder, model.autoencoder)
    if part.model.time_input:
      raise ValueError(f"tasks.compose.checkpoints: {path or workdir} is told the time: only fields without it add up")
    terms.append((part.model, part.params, label, weight))
  directory = os.path.join(workdir, "compose")
  compose.compose(config, terms, _source(config), batching, directory)
  log.info("composed samples: %s", directory)


def _inpaint(config, workdir, checkpoint):
  model, given, source, batching = _task(config, workdir, checkpoint)
  directory = os.path.join(workdir, "inpaint")
  inpaint.inpaint(config, model.model, model.params, given, source, batching, directory)
  log.info("painted images: %s", directory)


def _report(config, workdir, checkpoint):
  if checkpoint:
    raise ValueError(f"--checkpoint={checkpoint}: a report trains its own models")
  report.report(config, workdir, sharding.make_mesh(**config.mesh))


def _benchmark(config, workdir, checkpoint):
  if checkpoint:
    raise ValueError(f"--checkpoint={checkpoint}: a benchmark trains anew")
  if "prepare" in config:
    prepare.prepare(config)
  directory = os.path.join(workdir, "benchmark")
  benchmark.benchmark(config, pretrained.open_codec(config.autoencoder), directory)
  log.info("figures: %s", directory)


def _task(config, workdir, checkpoint, noisy=False):
  """(model, images, data set, batching) of a task."""
  model, source = _load(config, workdir, checkpoint, config.tasks.weights), _source(config)
  check_same_autoencoder("the model", model.autoencoder, source.autoencoder)
  batching = _batching(config, config.tasks, model)
  inputs.check_options(config.tasks, batching)
  return model, inputs.open_inputs(config.tasks, source, model.model, noisy), source, batching


def _load(config, workdir, checkpoint, weights) -> pretrained.Pretrained:
  """The model of the checkpoint, or of the workdir, which then must be of this config."""
  if not checkpoint:
    checks.check_same_run(workdir, config)
  return pretrained.load(checkpoint or workdir, weights=weights)


def _source(config) -> Source:
  return sources.open_source(config.data.source, {**config.data.options})


def _batching(config, options, model: pretrained.Pretrained | None = None) -> samplers.Batching:
  """With a model, of latents, also the decoder that belongs to it."""
  codec = pretrained.open_codec(config.autoencoder) if model else None
  if codec:
    check_same_autoencoder("the model", model.autoencoder, codec.identity)
    codec.check_decodes(model.model.input_shape)
  return samplers.Batching(
    mesh=sharding.make_mesh(**config.mesh),
    batch_size=options.batch_size,
    key=state.stream_key(options.seed, "samples"),
    multiplier=evaluate.schedule_of(config).multiplier,
    decode=codec.decode if codec else None,
    autoencoder=f"{codec.name} {codec.identity['sha256']}" if codec else "",
  )
