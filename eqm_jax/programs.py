"""What each --mode does: opens config, data and model, and hands them to the package that works on them."""

import functools
import logging
import os

import ml_collections

from eqm_jax import devices
from eqm_jax.benchmark import suite
from eqm_jax.data import sources
from eqm_jax.data.codec import Codec, check_same_autoencoder
from eqm_jax.data.samples import Source
from eqm_jax.evaluation import comparison, evaluate, features, real, sample, samplers, settings
from eqm_jax.networks.dit import DiT
from eqm_jax.plan import plan
from eqm_jax.report import report
from eqm_jax.tasks import compose, denoise, inpaint, inputs, ood
from eqm_jax.training import checkpoint as checkpoints
from eqm_jax.training import checks, prepare, pretrained, quality, state, train

log = logging.getLogger(__name__)

ALONE = ("sample", "denoise", "ood", "compose", "inpaint", "report", "benchmark")  # of one process; the rest share work


def run(
  mode: str,
  config: ml_collections.ConfigDict,
  workdir: str,
  checkpoint: str | None,
  topology: str | None = None,
  search: bool = False,
  compare: str | None = None,
  compare_any: bool = False,
):
  """Runs one mode.

  Args:
    mode: "prepare" (encode images into a cache of latents), "train" (prepare, if that is to do, and
      evaluate at the end), "evaluate", "statistics" (of the real images, for it), "sample", a task ("denoise", "ood",
      "compose", "inpaint"), "report", "benchmark" (how fast everything is), or "plan" (of TPU slices).
    config: of configs/.
    workdir: of the run.
    checkpoint: the model to use, if not the workdir's; "train" and "report" make theirs.
    topology: the slices of "plan", with commas between them.
    search: whether "plan" looks for cheaper settings even where those of the config fit.
    compare: an earlier benchmark.json that "benchmark" compares with.
    compare_any: whether that may be of another config or machine.

  Raises:
    ValueError: before any work, for what does not fit.
    FloatingPointError: if training diverges.
  """
  modes = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "statistics": _statistics,
    "sample": _sample,
    "denoise": _denoise,
    "ood": _ood,
    "compose": _compose,
    "inpaint": _inpaint,
    "report": _report,
    "benchmark": functools.partial(_benchmark, compare=compare, compare_any=compare_any),
    "plan": functools.partial(_plan, topology=topology, search=search),
  }
  if mode in ALONE and devices.process()[1] > 1:
    raise ValueError(f"--mode={mode} runs in one process, not in {devices.process()[1]}")
  if (topology or search) and mode != "plan":
    raise ValueError(f"--topology and --search are for --mode=plan, not for --mode={mode}")
  if (compare or compare_any) and mode != "benchmark":
    raise ValueError(f"--compare and --compare_any are for --mode=benchmark, not for --mode={mode}")
  if compare_any and not compare:
    raise ValueError("--compare_any: give the file to compare with, --compare=benchmark.json")
  modes[mode](config, workdir, checkpoint)


def _train(config, workdir, checkpoint):
  if checkpoint:
    raise ValueError(
      f"--checkpoint={checkpoint} is for the modes that use a model; training resumes in its workdir, "
      "and starts from other weights with --config.train.init_from"
    )
  evaluates, model = config.evaluation.samples > 0, DiT(**config.model)
  if evaluates:  # a mistake in the evaluation is told before anything takes long
    settings.check_options(config, model, batching := _batching(config, config.evaluation, model, None))
    quality.check(config, model, batching)
  else:
    log.info("evaluation.samples = 0: nothing is evaluated, not during training either")
  if "prepare" in config:
    prepare.prepare(config)
  codec = pretrained.open_codec(config.autoencoder)
  if not evaluates:
    train.train(config, workdir, codec)
    return
  batching = _batching(config, config.evaluation, model, codec)
  known = _known(config, model, batching)
  if train.train(config, workdir, codec, known, batching):
    _write_evaluation(config, workdir, None, _load(config, workdir, None, config.evaluation.weights), known, batching)


def _prepare(config, workdir, checkpoint):
  if checkpoint:
    raise ValueError(f"--checkpoint={checkpoint}: preparing data needs no model; give --config.autoencoder.path")
  if "prepare" not in config:
    raise ValueError("this config has no section `prepare`: its data set is read as it is")
  prepare.prepare(config, verify=True)


def _evaluate(config, workdir, checkpoint):
  features.check(config.evaluation)
  model = _load(config, workdir, checkpoint, config.evaluation.weights)
  batching = _batching(config, config.evaluation, model.model, _codec_of(config, model))
  known = _known(config, model.model, batching, model.autoencoder)
  _write_evaluation(config, workdir, checkpoint, model, known, batching)


def _write_evaluation(config, workdir, checkpoint, model, known, batching):
  directory = os.path.join(workdir, "evaluation")
  origin = {"checkpoint": checkpoint or "of the workdir", "step": model.step}
  evaluate.evaluate(config, model.model, model.params, known, batching, directory, origin)
  log.info("figures and pictures: %s", directory)


def _known(config, model: DiT, batching, autoencoder=None) -> comparison.Comparison:
  """The real data that samples are compared with, after what cannot be evaluated is refused."""
  settings.check_options(config, model, batching)
  samples, images = settings.needs(config)
  source, images = _source(config) if samples else None, _images(config) if images else None
  check_same_autoencoder("the model", autoencoder, source.autoencoder if source else None)
  settings.check_data(config, model, source, images, batching)
  return comparison.Comparison(config.evaluation, source, images, config.data.threads)


def _statistics(config, workdir, checkpoint):
  options, path = config.evaluation, config.evaluation.inception.reference
  if checkpoint:
    raise ValueError(f"--checkpoint={checkpoint}: statistics are of the data set, not of a model")
  if "inception" not in options.features or not path or os.path.exists(path):
    raise ValueError(
      f"evaluation.features = {tuple(options.features)} must name 'inception', and evaluation.inception.reference = "
      f"{path!r} a file that is not there yet: the statistics are written to it"
    )
  features.check(options)
  images = _images(config)
  space = features.open_features("inception", options, None, False)
  known = real.statistics(images, space, True, config.data.threads)
  if devices.process()[0] == 0:
    real.save(path, known)
  log.info("statistics of %d images: %s", len(images), path)


def _sample(config, workdir, checkpoint):
  model = _load(config, workdir, checkpoint, config.sample.weights)
  batching = _batching(config, config.sample, model.model, _codec_of(config, model))
  directory = os.path.join(workdir, "samples")
  sample.sample(config, model.model, model.params, batching, directory)
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
  options, batching = config.tasks.compose, _batching(config, config.tasks, model.model, _codec_of(config, model))
  inputs.check_options(config.tasks)
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
  report.report(config, workdir)


def _benchmark(config, workdir, checkpoint, compare, compare_any):
  directory = os.path.join(workdir, "benchmark")
  has_model = checkpoint or checkpoints.steps(workdir)
  trained = _load(config, workdir, checkpoint, config.evaluation.weights) if has_model else None
  codec = pretrained.open_codec(config.autoencoder) if os.path.exists(config.autoencoder.path) else None
  suite.benchmark(config, directory, codec, trained, compare, compare_any)
  log.info("numbers and pictures: %s", directory)


def _plan(config, workdir, checkpoint, topology, search):
  if checkpoint:
    raise ValueError(f"--checkpoint={checkpoint}: a plan needs no weights")
  directory = os.path.join(workdir, "plan")
  plan.plan(config, topology or "", directory, search)
  log.info("figures and pictures: %s", directory)


def _task(config, workdir, checkpoint, noisy=False):
  """(model, images, data set, batching) of a task."""
  model, source = _load(config, workdir, checkpoint, config.tasks.weights), _source(config)
  check_same_autoencoder("the model", model.autoencoder, source.autoencoder)
  batching = _batching(config, config.tasks, model.model, _codec_of(config, model))
  inputs.check_options(config.tasks)
  return model, inputs.open_inputs(config.tasks, source, model.model, noisy), source, batching


def _load(config, workdir, checkpoint, weights) -> pretrained.Pretrained:
  """The model of the checkpoint, or of the workdir, which then must be of this config."""
  if not checkpoint:
    checks.check_same_run(workdir, config)
  loaded = pretrained.load(checkpoint or workdir, weights=weights)
  devices.check_same(f"the step that is loaded from {checkpoint or workdir}", loaded.step)
  return loaded


def _source(config) -> Source:
  return sources.open_source(config.data.source, {**config.data.options})


def _images(config) -> Source:
  """The real images, of latents those that they were made of."""
  if "prepare" in config:
    return sources.open_source(config.prepare.source, {**config.prepare.options})
  source = _source(config)
  if source.autoencoder:
    raise ValueError(
      "evaluation.features: the data set has latents, not images: name 'raw', give evaluation.inception.reference, "
      "or a section `prepare` that tells where the images are"
    )
  return source


def _codec_of(config, model: pretrained.Pretrained) -> Codec | None:
  """The decoder that belongs to a model of latents."""
  codec = pretrained.open_codec(config.autoencoder)
  if codec:
    check_same_autoencoder("the model", model.autoencoder, codec.identity)
  return codec


def _batching(config, options, model: DiT, codec: Codec | None) -> samplers.Batching:
  return samplers.Batching(
    batch_size=options.batch_size,
    key=state.stream_key(options.seed, "samples"),
    multiplier=evaluate.schedule_of(config).multiplier,
    decode=codec.decode if codec else None,
    autoencoder=f"{codec.name} {codec.identity['sha256']}" if codec else "",
    decoder_dtype=codec.module.dtype if codec else "",
    image_shape=codec.image_shape(model.input_shape) if codec else None,
  )
