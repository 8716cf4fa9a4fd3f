"""Cases around the network: reading data, training with it, checkpoints, decoder, features and metrics."""

import functools
import math
import os
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax.benchmark import measure
from eqm_jax.benchmark.network_cases import NotApplicable, Workspace
from eqm_jax.benchmark.results import Row
from eqm_jax.checkpoints import manager as checkpoint_manager
from eqm_jax.data import codec as codec_lib
from eqm_jax.data import latents, pipeline, sources
from eqm_jax.data.samples import Source
from eqm_jax.evaluation import features as features_lib
from eqm_jax.evaluation import metrics
from eqm_jax.networks import autoencoder
from eqm_jax.networks.classifier import Classifier
from eqm_jax.training import sharding
from eqm_jax.training import step as step_lib

READ_BATCH = 256  # of the input pipeline alone, whatever the batch size of training
LOGITS = 1008  # classes of Inception, for the inception score
LEAST_SAMPLES = 10  # of which metrics are computed


def reading(w: Workspace) -> list[Row]:
  """The input pipeline alone, as fast as it delivers."""
  source = _open_data(w)
  data = _batches(w, source, READ_BATCH)
  next(data)
  turns = []
  for _ in range(w.turns):
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < w.config.benchmark.read_seconds / w.turns:
      next(data)
      count += 1
    turns.append((time.perf_counter() - begin) / count)
  data.close()
  about = f"{w.config.data.source}, {len(source)} samples, {w.config.data.threads} threads, batches of {READ_BATCH}"
  return [Row("reading data", about, "batch", measure.Timing(tuple(turns)), images=READ_BATCH)]


def training_loop(w: Workspace) -> list[Row]:
  """Training steps with the data of the config, read and placed while the devices work."""
  source = _open_data(w)
  encodes = w.codec is not None and source.autoencoder_id is None
  if not encodes and source.shape != w.model.input_shape:
    raise NotApplicable(f"data.source gives samples of shape {source.shape}, the model takes {w.model.input_shape}")
  about = w.config.data.source + (", encoded in each step" if encodes else "")
  return [_training_loop(w, "training with data", about, source, encodes)]


def online_training_loop(w: Workspace) -> list[Row]:
  """The same from the images that the cache of latents was made of, encoded in each step."""
  if "prepare" not in w.config:
    raise NotApplicable("the config has no section `prepare`")
  if w.codec is None:
    raise NotApplicable(f"no autoencoder at autoencoder.path = {w.config.autoencoder.path!r}")
  options = w.config.prepare
  source = _open_source(options.source, {**options.options})
  return [_training_loop(w, "training, encoding online", f"{options.source}, encoded in each step", source, True)]


def _training_loop(w: Workspace, name: str, about: str, source: Source, encodes: bool) -> Row:
  if w.config.benchmark.steps < 1:
    raise NotApplicable("benchmark.steps = 0")
  size = w.config.train.batch_size
  placed = sharding.batch_sharding(w.mesh, size, w.config.train.grad_accum_steps)
  data = _batches(w, source, size, place=lambda batch: jax.device_put(batch, placed))
  encoder_params = jax.device_put(jax.device_get(w.codec.params), sharding.replicated(w.mesh)) if encodes else None
  state, batch = w.init_state(), next(data)
  program = w.step_program
  if encodes:
    step = step_lib.make_step(w.config, w.model, w.optimizer, w.mesh, w.shardings, encoder=w.codec.module)
    program = measure.compile_program(step, state, batch, encoder_params)
  state, step_metrics = program.call(state, batch, encoder_params)
  jax.block_until_ready(step_metrics)

  waits, turns, steps = 0.0, [], max(1, w.config.benchmark.steps // w.turns)
  for _ in range(w.turns):
    begin = time.perf_counter()
    for _ in range(steps):
      wait_begin = time.perf_counter()
      batch = next(data)
      waits += time.perf_counter() - wait_begin
      previous = step_metrics
      state, step_metrics = program.call(state, batch, encoder_params)
      jax.device_get(previous)  # as in training, a step late
    jax.block_until_ready(step_metrics)
    turns.append((time.perf_counter() - begin) / steps)
  data.close()
  timing = measure.Timing(tuple(turns), steps)
  details = {"data_wait": waits / (steps * sum(turns))}
  about = f"{about}, batches of {size}"
  return Row(name, about, "step", timing, program if encodes else None, images=size, details=details)


def checkpoint_save(w: Workspace) -> list[Row]:
  """Saving the training state: until training may go on, and until it is on disk."""
  state = w.init_state()
  iterator = types.SimpleNamespace(get_state=lambda: {"position": 0})  # of the data, which a checkpoint holds too
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  blocking, total = [], []
  with tempfile.TemporaryDirectory(dir=w.directory) as directory:
    manager = checkpoint_manager.open_manager(directory, keep=1)
    with checkpoint_manager.finishing(manager):
      for step in range(1, min(w.turns, 3) + 2):
        begin = time.perf_counter()
        checkpoint_manager.save(manager, step, state, iterator)
        blocked = time.perf_counter() - begin
        manager.wait_until_finished()
        if step > 1:  # the first compiles the checksums
          blocking.append(blocked)
          total.append(time.perf_counter() - begin)
  about = f"{size / 2**20:.1f} MiB of parameters, average and optimizer, with checksums"
  rows = []
  for name, turns in (("checkpoint save, blocking", blocking), ("checkpoint save, total", total)):
    timing = measure.Timing(tuple(turns))
    details = {"bytes": size, "bytes_per_second": size / timing.median}
    rows.append(Row(name, about, "save", timing, details=details))
  return rows


def decoder(w: Workspace) -> list[Row]:
  """Latents to images."""
  if not w.config.autoencoder.path:
    raise NotApplicable("the samples are pixels: nothing is decoded")
  if w.codec:
    module, params, weights = w.codec.module, w.codec.params, w.config.autoencoder.path
  else:
    module = autoencoder.Autoencoder(dtype=w.config.autoencoder.dtype)
    params, weights = random_params(autoencoder.parameter_shapes(module)), "random weights of the published size"
  latent = jax.random.normal(jax.random.key(0), (_total(w, w.config.autoencoder.batch_size), *w.model.input_shape))
  function = functools.partial(codec_lib.decode_batch, module)
  about = f"{len(latent)} latents at a time, {weights}"
  return [_convolution_row(w, "decoder", about, (function, params, latent), w.config.autoencoder.dtype)]


def published_features(name: str, w: Workspace) -> list[Row]:
  """Features of images from a published network, as an FID takes them."""
  network, options = features_lib.PUBLISHED[name], w.config.evaluation[name]
  if name not in w.config.evaluation.features:
    raise NotApplicable(f"evaluation.features does not name {name!r}")
  if os.path.isfile(options.path):
    (module, params), weights = network.load(options.path), options.path
  else:
    (module, shapes), weights = network.without_weights(), "random weights of the published shapes"
    params = random_params(shapes)
  shape = (_total(w, options.batch_size), 256, 256, 3)
  pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

  def extract(params, images):
    return network.apply(module, params, images, options.resize)

  about = f"{len(pixels)} images of 256×256 at a time, {weights}"
  return [_convolution_row(w, f"{network.title} features", about, (extract, params, pixels), "float32 exact")]


def classifier_features(w: Workspace) -> list[Row]:
  """Features of the small classifier."""
  if "classifier" not in w.config.evaluation.features:
    raise NotApplicable("evaluation.features does not name 'classifier'")
  if w.model.num_classes < 2:
    raise NotApplicable("the data has fewer than two classes")
  module = Classifier(w.model.num_classes)
  shape = w.codec.image_shape(w.model.input_shape) if w.codec else w.model.input_shape
  pixels = np.random.default_rng(0).uniform(-1, 1, (_total(w, features_lib.BATCH), *shape)).astype(np.float32)
  params = jax.jit(module.init)(jax.random.key(0), jnp.asarray(pixels[:1]))["params"]

  def extract(params, images):
    return module.apply({"params": params}, images)

  about = f"{len(pixels)} images at a time, random weights"
  return [_convolution_row(w, "classifier features", about, (extract, params, pixels), "float32 exact")]


def metric_cases(w: Workspace) -> list[Row]:
  """The metrics of an evaluation, of random features with variances as unequal as those of images."""
  options = w.config.benchmark.metrics
  if options.samples < LEAST_SAMPLES:
    raise NotApplicable(f"benchmark.metrics.samples = {options.samples}")
  rng = np.random.default_rng(0)

  def random_features(count: int, size: int) -> np.ndarray:
    return rng.standard_normal((count, size), dtype=np.float32) * np.linspace(0.1, 2, size, dtype=np.float32)

  samples = random_features(options.samples, options.size)
  real = random_features(options.real, options.size)
  logits = random_features(options.samples, LOGITS)
  gaussian = metrics.GaussianStatistics.of(real).gaussian
  cases = {
    "mean and covariance": lambda: metrics.GaussianStatistics.of(samples),
    "Fréchet distance": lambda: metrics.frechet_of_gaussians(gaussian, gaussian),
    "Fréchet distance with its jackknife": lambda: metrics.frechet_with_error(samples, gaussian),
    "kernel distance": lambda: metrics.kernel_distance(samples, real),
    "MIND with its jackknife": lambda: metrics.mind_with_error(samples, real),
    "precision and recall": lambda: metrics.precision_recall(samples, real),
    "inception score": lambda: metrics.inception_score(logits),
  }
  about = f"{options.samples} × {options.size} features, {options.real} real ones"
  rows = []
  for name, function in cases.items():
    with measure.peak_process_memory() as peak:
      # NumPy needs no warm-up; the compilation of precision and recall is a small part of their time.
      timing, _ = measure.timed(function, turns=1, warm_up=False)
    process_bytes = peak[0] if peak else None
    rows.append(Row(f"metrics: {name}", about, "evaluation", timing, process_bytes=process_bytes))
  return rows


def _convolution_row(w: Workspace, name: str, about: str, call: tuple[Callable, Any, Any], precision: str) -> Row:
  """A row of `call`, (function, params, images). XLA counts the operations: there is no loop that it counts once."""
  function, params, images = call[0], w.replicate(call[1]), w.shard(call[2])
  program = measure.compile_program(function, params, images)
  cost = jax.jit(function).lower(params, images).cost_analysis()
  timing, _ = measure.timed(program.call, params, images, turns=w.turns)
  work = {"flops": cost["flops"], "flops_by": "compiler"} if cost else {}
  return Row(name, about, "batch", timing, program, images=len(images), precision=precision, **work)


def _total(w: Workspace, per_device: int) -> int:
  return per_device * len(w.devices)


def random_params(shapes: Any) -> Any:
  """Parameters of these shapes, at a scale that keeps activations from vanishing; times depend on nothing else."""

  def make(path, leaf) -> np.ndarray:
    if path[-1].key == "scale":
      return np.ones(leaf.shape, leaf.dtype)
    if leaf.ndim < 2:
      return np.zeros(leaf.shape, leaf.dtype)
    deviation = math.sqrt(2 / math.prod(leaf.shape[:-1]))
    return deviation * np.random.default_rng(0).standard_normal(leaf.shape, leaf.dtype)

  return jax.tree_util.tree_map_with_path(make, shapes)


def _open_data(w: Workspace) -> Source:
  """The data set of the config.

  Raises:
    NotApplicable: if it is not at hand. A cache of latents is not encoded here, which may take hours.
  """
  options = w.config.data
  if options.source == "latents" and not latents.is_finished(options.options.path):
    raise NotApplicable(f"no finished cache in data.options.path = {options.options.path!r}: --mode=prepare makes it")
  return _open_source(options.source, {**options.options})


def _open_source(name: str, options: dict[str, Any]) -> Source:
  try:
    return sources.open_source(name, options)
  except (ValueError, OSError, ImportError) as error:
    raise NotApplicable(f"the data set is not at hand: {error}") from error


def _batches(w: Workspace, source: Source, batch_size: int, place: Callable | None = None):
  return pipeline.batches(
    source,
    batch_size=batch_size,
    seed=w.config.seed,
    flip=w.config.data.flip,
    threads=w.config.data.threads,
    workers=w.config.data.workers,
    place=place,
  )
