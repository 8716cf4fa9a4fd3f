"""Trains one model: config and workdir in, checkpoints and metrics out."""

import contextlib
import functools
import json
import logging
import os
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from eqm_jax import devices, hardware
from eqm_jax.data import pipeline, sources
from eqm_jax.data.codec import Codec, check_same_autoencoder
from eqm_jax.equilibrium import objective
from eqm_jax.evaluation import samplers
from eqm_jax.evaluation.comparison import Comparison
from eqm_jax.files import claimed, write_json
from eqm_jax.networks import flops
from eqm_jax.networks.dit import DiT
from eqm_jax.training import checkpoint, checks, metrics, pretrained, quality, sharding, stopping, tracing
from eqm_jax.training import state as state_lib
from eqm_jax.training import step as step_lib

log = logging.getLogger(__name__)


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  codec: Codec | None = None,
  known: Comparison | None = None,
  batching: samplers.Batching | None = None,
) -> bool:
  """Trains to `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: the whole config.
    workdir: of the run.
    codec: with it a model of latents is trained on images, which are encoded in each step; it is
      not needed with a cache.
    known, batching: with them the run is evaluated as `config.evaluation.during_training` says, and its best
      checkpoint is kept.

  Returns:
    True when trained to the end; False when SIGTERM came first, after saving.

  Raises:
    ValueError: before compilation, if something in the config does not fit, or another run has the workdir.
    FloatingPointError: if the loss stops being finite; names the step.
    OSError: if a checkpoint cannot be written; those before it stay.
  """
  # ---------------------------------------------------------------- what is asked
  source = sources.open_source(config.data.source, {**config.data.options})
  model = DiT(**config.model)
  encodes = codec is not None and source.autoencoder is None
  identity = codec.identity if encodes else source.autoencoder
  if codec:
    check_same_autoencoder(f"data.source {config.data.source!r}", identity, codec.identity)
  checks.check_fits(config, model, source, codec if encodes else None, identity)
  schedule = objective.Schedule(**config.objective.schedule)
  steps, batch_size = config.train.steps, config.train.batch_size
  optimizer = state_lib.make_optimizer(config.optimizer, steps)
  mesh = sharding.make_mesh(**config.mesh)
  batch_sharding = sharding.batch_sharding(mesh, batch_size, config.train.accumulate)
  trace = tracing.Trace(config.train.profile, workdir)
  checks.check_same_run(workdir, config, identity, len(source))

  # ---------------------------------------------------------------- state: shapes → shardings → jitted init
  init = functools.partial(state_lib.init_state, model, optimizer, config.seed)
  shapes = jax.eval_shape(init)
  shardings = sharding.state_shardings(shapes, config.sharding, mesh)
  log.info("model\n%s", clu.parameter_overview.get_parameter_overview(shapes.params, include_stats=False))
  log.info("sharding, and what one device holds\n%s", sharding.table(shapes.params, shardings.params))
  _log_devices(config, mesh)

  with contextlib.ExitStack() as stack:
    if devices.process()[0] == 0:
      stack.enter_context(claimed(workdir))
    begins_warm = config.train.init_from and not checkpoint.steps(workdir)
    warm = _warm_start(config.train.init_from, model, shapes.params) if begins_warm else None
    rows = sharding.rows_here(batch_sharding, batch_size)
    data = pipeline.batches(
      source,
      batch_size=batch_size,
      seed=config.seed,
      flip=config.data.flip,
      threads=config.data.threads,
      workers=config.data.workers,
      rows=rows,
      place=functools.partial(jax.tree.map, functools.partial(sharding.place_rows, batch_sharding, batch_size, rows)),
    )
    scores = None
    manager = checkpoint.open_manager(workdir, config.checkpoint.keep, lambda: scores.best if scores else None)
    told_to_stop = stack.enter_context(
      stopping.told_to_stop(manager)
    )  # outermost: also while the last save is on its way
    stack.enter_context(checkpoint.finishing(manager))
    described = json.loads(config.to_json())
    described["data"]["samples"] = len(source)
    if identity:
      described["autoencoder"] |= {name: identity[name] for name in ("name", "sha256")}
    if jax.process_index() == 0:
      write_json(os.path.join(workdir, pretrained.CONFIG), described)
    placed = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)
    if found := checkpoint.restore_newest(manager, placed, data):
      state, first_step = found
      log.info("resumed from step %d", first_step)
    else:
      state, first_step = jax.jit(init, out_shardings=shardings)(), 0
      if warm is not None:
        params = jax.device_put(jax.device_get(warm), shardings.params)  # from the host: of one device to those of all
        state = state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))
        log.info("started from the weights of %s", config.train.init_from)
    if known is not None and config.evaluation.during_training.every:
      scores = quality.Quality(config, workdir, model, known, batching, mesh, first_step)

    # ---------------------------------------------------------------- one step
    frozen = jax.device_put(jax.device_get(codec.params), sharding.replicated(mesh)) if encodes else None
    step_fn = step_lib.make_step(config, model, optimizer, mesh, shardings, codec.module if encodes else None)

    # ---------------------------------------------------------------- the loop
    zero_loss = _loss_scale(config.objective, schedule)
    writer = metrics.MetricWriter(
      workdir, first_step=first_step, last_step=steps, batch_size=batch_size, flops_per_example=flops.training(model)
    )
    skipped = int(state_lib.skipped(state.opt_state)) if config.optimizer.skip_nonfinite else 0

    def report(step, scalars):
      """Fetches one step's metrics, a step late so that the device always has work queued."""
      nonlocal skipped
      scalars = {name: float(value) for name, value in jax.device_get(scalars).items()}
      before, skipped = skipped, scalars.get("skipped", 0)
      # A batch that is left out has spoilt its loss, but not the parameters.
      vital = ("parameter_norm", "learning_rate") if skipped > before else scalars
      seen = ", ".join(f"{name} = {value}" for name, value in scalars.items())
      if not all(np.isfinite(scalars[name]) for name in vital):
        raise FloatingPointError(
          f"step {step}: {seen}; stopped. The newest checkpoint is that of step {manager.latest_step()}"
        )
      if skipped > before:
        log.warning("step %d: %s; this batch is left out", step, seen)
      if scores:
        scores.collect(writer, wait=False)
      if step % config.train.log_every == 0 or step in (1, steps):
        writer.write(step, {**scalars, "relative_loss": scalars["loss"] / zero_loss})

    def judge(step, state):
      """Draws samples, if the step is to be evaluated."""
      if scores and scores.is_due(step):
        with writer.apart():
          scores.draw(step, state, writer)

    for closed in (writer, trace):
      stack.enter_context(contextlib.closing(closed))
    pending, stopped = None, False
    judge(first_step, state)  # the run was killed before the scores of its last checkpoint were there
    for step in range(first_step + 1, steps + 1):
      with writer.waiting():
        batch = next(data)
      trace.before(step)
      state, scalars = step_fn(state, batch, frozen)
      trace.after(step, scalars)
      if pending:
        report(*pending)
      pending = step, scalars
      stopped = told_to_stop(step)
      due = scores is not None and scores.is_due(step)
      if step % config.checkpoint.every == 0 or step == steps or stopped or due:
        report(*pending)  # nothing that is not finite gets into a checkpoint
        pending = None
        if scores and not stopped:  # a process that is told to end has no time for it
          scores.collect(writer)  # which of the checkpoints is the best
        checkpoint.save(manager, step, state, data)
      if stopped:
        break
      judge(step, state)
    if scores and not stopped:
      scores.collect(writer)
  if stopped:
    log.info("SIGTERM: saved step %d", step)
  return not stopped


def _log_devices(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh):
  kind, described = jax.devices()[0].device_kind, dict(mesh.shape)
  log.info("devices: %d × %s in %d processes, mesh %s", jax.device_count(), kind, jax.process_count(), described)
  if hardware.chip_of(kind) is None:
    log.info("hardware.py knows no peak rate of %s: no model FLOPs utilization (mfu) is told", kind)
  if cache := jax.config.jax_compilation_cache_dir:
    log.info("compiled programs are kept in %s", cache)
  if config.objective.dispersive_weight:
    size = config.train.batch_size
    log.info("dispersive loss: over all %d² pairs of the global batch, whatever the mesh", size)


def _warm_start(path: str, model: DiT, shapes: Any) -> Any:
  """The averaged weights of another model, if they have this model's shapes."""
  loaded = pretrained.load(path, weights="ema")
  devices.check_same(f"the step that is loaded from {path}", loaded.step)
  theirs, ours = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (loaded.params, shapes))
  for name in sorted(theirs.keys() | ours.keys(), key=str):
    there, here = (tree[name].shape if name in tree else "absent" for tree in (theirs, ours))
    if there != here:
      raise ValueError(
        f"train.init_from = {path!r}: parameter {sharding.path_name(name)} is {there} there and "
        f"{here} in this model: the attributes that shape the two networks must be the same"
      )
  if model.energy == "l2" and not any(np.any(leaf) for leaf in jax.tree.leaves(loaded.params["final_out"])):
    raise ValueError(f"train.init_from = {path!r} has an output layer of zeros, {checks.NO_GRADIENT}")
  return loaded.params


def _loss_scale(config: ml_collections.ConfigDict, schedule: objective.Schedule) -> float:
  """E[c²] of the samples, which makes losses comparable; flow matching has c ≡ 1, and at γ = 1 EqM has c = 0."""
  if config.kind != "equilibrium":
    return 1.0
  at_data = float(objective.magnitude(jnp.ones(()), schedule)) ** 2
  return (1 - config.clean_share) * objective.mean_square_magnitude(schedule) + config.clean_share * at_data
