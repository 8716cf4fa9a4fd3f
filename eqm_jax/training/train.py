"""Trains one model: config and workdir in, checkpoints and metrics out."""

import contextlib
import functools
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from eqm_jax.data import pipeline, sources
from eqm_jax.data.codec import Codec, check_same_autoencoder, encode_batch
from eqm_jax.equilibrium import energy, objective
from eqm_jax.evaluation import samplers
from eqm_jax.evaluation.comparison import Comparison
from eqm_jax.files import write_json
from eqm_jax.networks.autoencoder import posterior_sample
from eqm_jax.networks.dit import DiT
from eqm_jax.training import checkpoint, checks, metrics, pretrained, quality, sharding
from eqm_jax.training import state as state_lib

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
    ValueError: before compilation, if something in the config does not fit.
    FloatingPointError: if the loss stops being finite; names the step.
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
  batch_sharding = sharding.batch_sharding(mesh, batch_size)
  checks.check_same_run(workdir, config, identity, len(source))

  # ---------------------------------------------------------------- state: shapes → shardings → jitted init
  init = functools.partial(state_lib.init_state, model, optimizer, config.seed)
  shapes = jax.eval_shape(init)
  shardings = sharding.tree_shardings(shapes, config.sharding.rules, mesh)
  log.info("model\n%s", clu.parameter_overview.get_parameter_overview(shapes.params, include_stats=False))
  log.info("sharding\n%s", sharding.table(shardings.params))
  log.info("devices: %d × %s, mesh %s", jax.device_count(), jax.devices()[0].device_kind, dict(mesh.shape))

  begins_warm = config.train.init_from and not checkpoint.steps(workdir)
  warm = _warm_start(config.train.init_from, model, shapes.params) if begins_warm else None
  data = pipeline.batches(
    source,
    batch_size=batch_size,
    seed=config.seed,
    flip=config.data.flip,
    threads=config.data.threads,
    workers=config.data.workers,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    place=functools.partial(jax.tree.map, functools.partial(jax.make_array_from_process_local_data, batch_sharding)),
  )
  scores = None
  manager = checkpoint.open_manager(workdir, config.checkpoint.keep, lambda: scores.best if scores else None)
  first_step = manager.latest_step() or 0
  if known is not None and config.evaluation.during_training.every:
    scores = quality.Quality(config, workdir, model, known, batching, mesh, first_step)
  described = json.loads(config.to_json())
  described["data"]["samples"] = len(source)
  if identity:
    described["autoencoder"] |= {name: identity[name] for name in ("name", "sha256")}
  if jax.process_index() == 0:
    write_json(os.path.join(workdir, pretrained.CONFIG), described)
  if first_step:
    placed = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)
    state = checkpoint.restore(manager, first_step, placed, data)
    log.info("resumed from step %d", first_step)
  else:
    state = jax.jit(init, out_shardings=shardings)()
    if warm is not None:
      params = jax.device_put(warm, shardings.params)
      state = state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))
      log.info("started from the weights of %s", config.train.init_from)

  # ---------------------------------------------------------------- one step
  learning_rate = state_lib.learning_rate_schedule(config.optimizer, steps)

  frozen = jax.device_put(codec.params, sharding.replicated(mesh)) if encodes else None

  def step_fn(state, batch, frozen):
    batch = encode_batch(codec.module, frozen, batch) if encodes else batch
    key = jax.random.fold_in(state_lib.stream_key(config.seed, "steps"), state.step)
    loss_fn = functools.partial(batch_loss, model, config.objective, schedule, batch, key)
    loss, gradient = jax.value_and_grad(loss_fn)(state.params)
    updated = state_lib.update(state, gradient, optimizer, config.optimizer.ema_decay)
    scalars = {
      "loss": loss,
      "gradient_norm": optax.tree.norm(gradient),
      "parameter_norm": optax.tree.norm(updated.params),  # not finite if the update was not
      "learning_rate": learning_rate(state.step),
    }
    return updated, scalars

  step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))

  # ---------------------------------------------------------------- the loop
  zero_loss = _loss_scale(config.objective, schedule)
  writer = metrics.MetricWriter(workdir, first_step=first_step, last_step=steps, batch_size=batch_size)

  def report(step, scalars):
    """Fetches one step's metrics, a step late so that the device always has work queued."""
    scalars = {name: float(value) for name, value in jax.device_get(scalars).items()}
    if not all(np.isfinite(value) for value in scalars.values()):
      seen = ", ".join(f"{name} = {value}" for name, value in scalars.items())
      raise FloatingPointError(
        f"step {step}: {seen}; stopped. The newest checkpoint is that of step {manager.latest_step()}"
      )
    if scores:
      scores.collect(writer, wait=False)
    if step % config.train.log_every == 0 or step in (1, steps):
      writer.write(step, {**scalars, "relative_loss": scalars["loss"] / zero_loss})

  def judge(step, state):
    """Draws samples, if the step is to be evaluated."""
    if scores and scores.is_due(step):
      with writer.apart():
        scores.draw(step, state, writer)

  with contextlib.ExitStack() as stack:
    for closed in (manager, writer):
      stack.enter_context(contextlib.closing(closed))
    stopped = stack.enter_context(_sigterm())
    pending = None
    judge(first_step, state)  # the run was killed before the scores of its last checkpoint were there
    for step in range(first_step + 1, steps + 1):
      with writer.waiting():
        batch = next(data)
      state, scalars = step_fn(state, batch, frozen)
      if pending:
        report(*pending)
      pending = step, scalars
      stopping = stopped.is_set()
      due = scores is not None and scores.is_due(step)
      if step % config.checkpoint.every == 0 or step == steps or stopping or due:
        report(*pending)  # nothing that is not finite gets into a checkpoint
        pending = None
        if scores and not stopping:  # a process that is told to end has no time for it
          scores.collect(writer)  # which of the checkpoints is the best
        checkpoint.save(manager, step, state, data)
      if stopping:
        log.info("SIGTERM: saved step %d", step)
        break
      judge(step, state)
    if scores and not stopped.is_set():
      scores.collect(writer)
  return not stopped.is_set()


def batch_loss(
  model: DiT,
  config: ml_collections.ConfigDict,
  schedule: objective.Schedule,
  batch: dict[str, jax.Array],
  key: jax.Array,
  params: Any,
) -> jax.Array:
  """The loss of one batch, a scalar; `config` is the objective section.

  All randomness is drawn here, for the global batch, from the one key of the step.
  """
  key_data, key_gamma, key_noise, key_label, key_clean = jax.random.split(key, 5)
  data_BxHxWxC = draw_data(batch, key_data)
  gamma_B = jax.random.uniform(key_gamma, data_BxHxWxC.shape[:1])
  gamma_B = jnp.where(jax.random.bernoulli(key_clean, config.clean_share, gamma_B.shape), 1.0, gamma_B)
  noise_BxHxWxC = jax.random.normal(key_noise, data_BxHxWxC.shape)
  dropped_B = jax.random.bernoulli(key_label, config.label_dropout, gamma_B.shape)
  label_B = jnp.where(dropped_B, model.num_classes, batch["label"])

  def field_fn(x_BxHxWxC, *gamma):  # → f, and the tokens for the dispersive loss
    if energy.is_energy(model):
      return energy.SECOND_ORDER[config.second_order](model, model.energy, params, x_BxHxWxC, label_B), None
    return model.apply({"params": params}, x_BxHxWxC, label_B, *gamma, return_tokens=True)

  if config.kind == "equilibrium":
    loss_B, tokens = objective.equilibrium_loss(field_fn, data_BxHxWxC, noise_BxHxWxC, gamma_B, schedule, has_aux=True)
  else:
    loss_B, tokens = objective.flow_matching_loss(
      field_fn, data_BxHxWxC, noise_BxHxWxC, gamma_B, timed=model.time_input, has_aux=True
    )
  loss = jnp.mean(loss_B)
  if config.dispersive_weight:
    loss += config.dispersive_weight * objective.dispersive_loss(tokens)
  return loss


def draw_data(batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
  """The batch's images, or latents drawn from the autoencoder's posterior N(mean, exp(logvar))."""
  if "image" in batch:
    return batch["image"]
  return posterior_sample(batch["mean"], batch["logvar"], key)


def _warm_start(path: str, model: DiT, shapes: Any) -> Any:
  """The averaged weights of another model, if they have this model's shapes."""
  loaded = pretrained.load(path, weights="ema")
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


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
  """An event that SIGTERM sets, instead of killing the process."""
  stopped = threading.Event()
  previous = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
  try:
    yield stopped
  finally:
    signal.signal(signal.SIGTERM, previous)
