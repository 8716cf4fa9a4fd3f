"""Trains one model: config and workdir in, checkpoints and metrics out."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import clu.parameter_overview
import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding

import eqm_jax
from eqm_jax import distributed, hardware, progress
from eqm_jax.checkpoints import manager as checkpoint_manager
from eqm_jax.checkpoints import pretrained
from eqm_jax.data import pipeline, sources
from eqm_jax.data.codec import Codec, check_same_autoencoder
from eqm_jax.data.samples import Source
from eqm_jax.evaluation.reference_data import ReferenceData
from eqm_jax.io import workdir_lock, write_json
from eqm_jax.networks import attention, flops
from eqm_jax.networks.dit import BLOCK_OPTIONS, DiT, first_difference
from eqm_jax.sampling.generator import Generator
from eqm_jax.training import metric_logger, periodic_evaluation, run_page, sharding, validation, wandb_run
from eqm_jax.training import state as state_lib
from eqm_jax.training import step as step_lib
from eqm_jax.training.preemption import Preemption
from eqm_jax.training.profiler import Profiler

log = logging.getLogger(__name__)


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  codec: Codec | None = None,
  *,
  reference: ReferenceData | None = None,
  generator: Generator | None = None,
) -> bool:
  """Trains to `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: the whole config.
    workdir: of the run.
    codec: encodes images in each step, for a model of latents without a cache of them.
    reference, generator: real data and how to sample, for the evaluation that `config.evaluation.during_training`
      describes; the best checkpoint is then kept. The generator needs no parameters.

  Returns:
    True when trained to the end; False when SIGTERM came first, after saving.

  Raises:
    ValueError: before compilation, if something in the config does not fit, or another run has the workdir.
    FloatingPointError: if the loss is no longer finite; names the step.
    OSError: if a checkpoint cannot be written; those before it stay.
  """
  run = _set_up(config, workdir, codec)
  profiler = Profiler(config.train.profile, workdir)
  with contextlib.ExitStack() as stack:
    if distributed.process_index_and_count()[0] == 0:
      stack.enter_context(workdir_lock(workdir))
    init_params = _load_init_params(config.train.init_from, workdir, run)
    batches = _open_batches(config, run)
    stack.callback(pipeline.close, batches)
    evaluation = periodic_evaluation.open_evaluation(config, workdir, run.mesh, reference, generator)
    stack.callback(evaluation.close)
    checkpoints = checkpoint_manager.open_manager(workdir, config.checkpoint.keep, lambda: evaluation.best)
    preemption = stack.enter_context(Preemption(checkpoints))  # outermost: also while the last save is being written
    stack.enter_context(checkpoint_manager.finishing(checkpoints))
    _write_config(config, workdir, run)
    with progress.waiting("reading the newest checkpoint, or initializing the parameters"):
      state, first_step = _restore_or_init(checkpoints, run, batches, init_params)
    logger = stack.enter_context(contextlib.closing(_open_logger(config, workdir, checkpoints, state, first_step)))
    stack.enter_context(contextlib.closing(profiler))
    encoder, encoder_params = _place_encoder(run)
    train_step = step_lib.make_step(config, run.model, run.optimizer, run.mesh, run.shardings, encoder=encoder)

    evaluation.resume(first_step, logger)
    evaluation.start_if_due(first_step, state)  # the run may have been killed before these metrics were computed
    steps, stop = config.train.steps, False
    if first_step < steps:
      log.info("compiling the training step")
    for step in range(first_step + 1, steps + 1):
      with logger.data_wait():
        batch = next(batches)
      with profiler.step(step):
        state, metrics = train_step(state, batch, encoder_params)
      logger.log_previous(step, metrics)
      evaluation.collect(wait=False)
      stop = preemption.requested(step)
      if stop or step == steps or step % config.checkpoint.every == 0 or evaluation.is_due(step):
        logger.flush()  # nothing that is not finite is saved
        evaluation.collect(wait=not stop)  # the best step is known; a process that has to end does not wait for it
        checkpoint_manager.save(checkpoints, step, state, batches)
      if stop:
        break
      evaluation.start_if_due(step, state)
    evaluation.collect(wait=not stop)
    if not stop and distributed.process_index_and_count()[0] == 0:
      run_page.write(workdir)
  if stop:
    log.info("SIGTERM: saved step %d", step)
  return not stop


def check(config: ml_collections.ConfigDict, workdir: str):
  """Refuses what is wrong whatever the data: a setting, the mesh, or a workdir of another run.

  Raises:
    ValueError: naming it.
  """
  _lay_out(config)
  Profiler(config.train.profile, workdir)
  validation.check_same_config(workdir, config)
  if distributed.process_index_and_count()[0] == 0:
    with workdir_lock(workdir):  # which nothing else has, and where files can be written
      pass


@dataclasses.dataclass(frozen=True)
class _Layout:
  """The model, its optimizer and its state, over all devices."""

  model: DiT
  optimizer: optax.GradientTransformation
  mesh: Mesh
  batch_sharding: NamedSharding
  init: Callable[[], state_lib.TrainState]
  shapes: state_lib.TrainState  # of the state's arrays
  shardings: state_lib.TrainState


@dataclasses.dataclass(frozen=True)
class _Run(_Layout):
  """Layout and data of a run, checked against each other."""

  source: Source
  codec: Codec | None  # encodes the images of each batch
  autoencoder_id: dict[str, Any] | None  # of the latents that are trained on


def _lay_out(config: ml_collections.ConfigDict) -> _Layout:
  """Makes what needs no data; refuses settings that do not fit each other or the devices."""
  model = DiT(**config.model)
  attention.check(model.attention)
  validation.check_config(config, model)
  wandb_run.check(config.train.wandb_project)
  optimizer = state_lib.make_optimizer(config.optimizer, config.train.steps)
  mesh = sharding.make_mesh(**config.mesh)
  batch_sharding = sharding.batch_sharding(mesh, config.train.batch_size, config.train.grad_accum_steps)

  # The state: shapes → shardings → jitted init.
  init = functools.partial(state_lib.init_state, model, optimizer, config.seed)
  shapes = jax.eval_shape(init)
  shardings = sharding.state_shardings(shapes, config.sharding, mesh)
  return _Layout(model, optimizer, mesh, batch_sharding, init=init, shapes=shapes, shardings=shardings)


def _set_up(config: ml_collections.ConfigDict, workdir: str, codec: Codec | None) -> _Run:
  """Opens the data and makes everything that writes nothing; refuses what does not fit."""
  layout = _lay_out(config)
  source = sources.open_source(config.data.source, {**config.data.options})
  is_encoded = codec is not None and source.autoencoder_id is None
  autoencoder_id = codec.autoencoder_id if is_encoded else source.autoencoder_id
  if codec:
    check_same_autoencoder(f"data.source {config.data.source!r}", autoencoder_id, codec.autoencoder_id)
  codec = codec if is_encoded else None
  validation.check_fits(config, layout.model, source, codec, autoencoder_id)
  validation.check_same_run(workdir, config, autoencoder_id, len(source), source.class_names)
  overview = clu.parameter_overview.get_parameter_overview(layout.shapes.params, include_stats=False)
  log.info("model\n%s", overview)
  log.info("sharding, and memory on one device\n%s", sharding.table(layout.shapes.params, layout.shardings.params))
  _log_devices(config, layout.mesh)
  return _Run(**vars(layout), source=source, codec=codec, autoencoder_id=autoencoder_id)


def _log_devices(config: ml_collections.ConfigDict, mesh: Mesh):
  kind, axes = jax.devices()[0].device_kind, dict(mesh.shape)
  log.info("devices: %d × %s in %d processes, mesh %s", jax.device_count(), kind, jax.process_count(), axes)
  if hardware.chip_of(kind) is None:
    log.info("hardware.py has no peak rate of %s: no model FLOPs utilization (mfu) is computed", kind)
  if cache := jax.config.jax_compilation_cache_dir:
    log.info("compiled programs are cached in %s", cache)
  if config.objective.dispersive_weight:
    log.info("dispersive loss: over all %d² pairs of the global batch, on any mesh", config.train.batch_size)


def _load_init_params(path: str | None, workdir: str, run: _Run) -> Any:
  """The averaged weights of another model; None for a run that resumes.

  A model with other classes gives all but the label table: of that, the null class, and the run initializes the others.

  Raises:
    ValueError: naming the attributes in which the models differ, and a parameter, if they do not fit otherwise.
  """
  if path is None or checkpoint_manager.steps(workdir):
    return None
  # A file of another program need not have the number of heads.
  loaded = pretrained.load(path, "ema", **({"num_heads": run.model.num_heads} if pretrained.foreign_file(path) else {}))
  distributed.check_same(f"the step that is loaded from {path}", loaded.step)
  classes = loaded.model.num_classes
  difference = first_difference(loaded.model.clone(num_classes=run.model.num_classes), run.model)
  if difference:
    words, name, their_shape, our_shape = difference
    raise ValueError(
      f"train.init_from = {path!r}: {words} (its parameter {name} is {their_shape}, but {our_shape} in this model): "
      "the attributes that shape the two networks must be the same, but for num_classes"
    )
  if run.model.energy == "l2" and not any(np.any(leaf) for leaf in jax.tree.leaves(loaded.params["final_out"])):
    raise ValueError(f"train.init_from = {path!r} has an output layer of zeros, {validation.NO_GRADIENT}")
  log.info("started from the weights of %s", path)
  for name in BLOCK_OPTIONS:  # those that shape no parameter
    theirs, ours = getattr(loaded.model, name), getattr(run.model, name)
    if theirs != ours:
      log.warning("the weights were trained with model.%s = %r, this model has %r", name, theirs, ours)
  if classes == run.model.num_classes:
    return loaded.params
  log.warning(
    "%s has %d classes, this model %d: everything but the label table is taken from it, and the row of the null class",
    path, classes, run.model.num_classes,
  )  # fmt: skip
  label_table = np.array(jax.jit(lambda: run.init().params["label_embed"]["embedding"])())
  label_table[-1] = loaded.params["label_embed"]["embedding"][-1]
  return {**loaded.params, "label_embed": {"embedding": label_table}}


def _open_batches(config: ml_collections.ConfigDict, run: _Run) -> grain.DatasetIterator:
  """The stream of training batches, already on the devices."""
  batch_size = config.train.batch_size
  rows = sharding.local_rows(run.batch_sharding, batch_size)
  place = functools.partial(sharding.global_array, run.batch_sharding, batch_size, rows)
  return pipeline.batches(
    run.source,
    batch_size=batch_size,
    seed=config.seed,
    flip=config.data.flip,
    threads=config.data.threads,
    workers=config.data.workers,
    rows=rows,
    place=functools.partial(jax.tree.map, place),
  )


def _write_config(config: ml_collections.ConfigDict, workdir: str, run: _Run):
  """Writes the resolved config, the version that wrote it, and what identifies the data."""
  resolved = json.loads(config.to_json()) | {validation.VERSION: eqm_jax.__version__}
  resolved["data"]["num_samples"] = len(run.source)
  resolved["data"]["class_names"] = run.source.class_names
  if run.autoencoder_id:
    resolved["autoencoder"] |= {name: run.autoencoder_id[name] for name in ("name", "sha256")}
  if jax.process_index() == 0:
    write_json(os.path.join(workdir, pretrained.CONFIG), resolved)
  run_page.write_environment(workdir, run.mesh)


def _restore_or_init(
  checkpoints: ocp.CheckpointManager, run: _Run, batches: grain.DatasetIterator, init_params: Any
) -> tuple[state_lib.TrainState, int]:
  """The state of the newest checkpoint and its step; without one, the initial state and 0."""
  placed = jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), run.shapes, run.shardings
  )
  restored = checkpoint_manager.restore_newest(checkpoints, placed, batches)
  if restored:
    log.info("resumed from step %d", restored[1])
    return restored
  state = jax.jit(run.init, out_shardings=run.shardings)()
  if init_params is not None:
    # By way of the host, from one device to all of the mesh.
    params = jax.device_put(jax.device_get(init_params), run.shardings.params)
    state = state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))
  return state, 0


def _open_logger(
  config: ml_collections.ConfigDict,
  workdir: str,
  checkpoints: ocp.CheckpointManager,
  state: state_lib.TrainState,
  first_step: int,
) -> metric_logger.MetricLogger:
  skips = config.optimizer.max_skipped_batches > 0
  return metric_logger.MetricLogger(
    workdir,
    first_step=first_step,
    last_step=config.train.steps,
    batch_size=config.train.batch_size,
    log_every=config.train.log_every,
    flops_per_example=flops.training(DiT(**config.model)),
    loss_scale=metric_logger.loss_scale(config.objective),
    skipped_batches=int(state_lib.skipped_batches(state.opt_state)) if skips else 0,
    newest_checkpoint=checkpoints.latest_step,
    wandb_run=wandb_run.WandbRun(config, workdir),
  )


def _place_encoder(run: _Run) -> tuple[Any, Any]:
  """The module that encodes the images of each batch, and its parameters on all devices; (None, None) without one."""
  if run.codec is None:
    return None, None
  return run.codec.module, jax.device_put(jax.device_get(run.codec.params), sharding.replicated(run.mesh))
