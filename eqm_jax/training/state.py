"""The training state, arrays only, and the optimizer that moves it."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from eqm_jax.networks.dit import DiT


@flax.struct.dataclass
class TrainState:
  """All that a training step reads and writes."""

  step: jax.Array  # int32, updates done
  params: Any
  ema_params: Any  # exponential moving average of params, started at them
  opt_state: Any


# Random numbers for one purpose never share a key with those for another.
STREAMS = {"parameters": 0, "steps": 1, "samples": 2}


def stream_key(seed: int, purpose: str) -> jax.Array:
  """The root key of one purpose of a seed; a step or a sample index is folded into it."""
  return jax.random.fold_in(jax.random.key(seed), STREAMS[purpose])


def init_state(model: DiT, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
  """The state before the first step; a function of the seed alone. Jit it with shardings."""
  x, label = jnp.zeros((1, *model.input_shape)), jnp.zeros(1, jnp.int32)
  gamma = (jnp.zeros(1),) if model.time_input else ()
  params = model.init(stream_key(seed, "parameters"), x, label, *gamma)["params"]
  # A copy, not an alias: both are donated to the first step.
  ema_params = jax.tree.map(jnp.copy, params)
  return TrainState(
    step=jnp.zeros((), jnp.int32), params=params, ema_params=ema_params, opt_state=optimizer.init(params)
  )


def learning_rate_schedule(config: ml_collections.ConfigDict, steps: int) -> Callable[[int], jax.Array]:
  """step → learning rate: linear warm-up to the peak, then constant or a cosine to zero.

  Raises:
    ValueError: for an unknown schedule or a warm-up longer than the run.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  if not peak > 0:
    raise ValueError(f"optimizer.learning_rate = {peak} must be positive")
  if not 0 <= warmup <= steps:
    raise ValueError(f"optimizer.warmup_steps = {warmup} must lie between 0 and train.steps = {steps}")
  if config.schedule not in ("constant", "cosine"):
    raise ValueError(f"optimizer.schedule = {config.schedule!r} is neither 'constant' nor 'cosine'")
  rest = optax.constant_schedule(peak)
  if config.schedule == "cosine":
    rest = optax.cosine_decay_schedule(peak, max(1, steps - warmup))
  return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), rest], [warmup])


def make_optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
  """AdamW, after clipping of the gradient's global norm where `clip_norm` is above 0.

  With `skip_nonfinite` a gradient that is not finite changes no parameter, until more than so many follow each
  other; the average goes on towards the parameters as they are.
  """
  adamw = optax.adamw(
    learning_rate_schedule(config, steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
  )
  if config.clip_norm < 0:
    raise ValueError(f"optimizer.clip_norm = {config.clip_norm} must not be negative (0: no clipping)")
  if config.skip_nonfinite < 0:
    raise ValueError(f"optimizer.skip_nonfinite = {config.skip_nonfinite} must not be negative (0: none is skipped)")
  optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
  return optax.apply_if_finite(optimizer, config.skip_nonfinite) if config.skip_nonfinite else optimizer


def skipped(opt_state: optax.ApplyIfFiniteState) -> jax.Array:
  """How many batches the run has skipped, with optimizer.skip_nonfinite."""
  return opt_state.total_notfinite


def update(state: TrainState, gradient: Any, optimizer: optax.GradientTransformation, ema_decay: float) -> TrainState:
  """One optimizer step and one step of the average: ema ← d·ema + (1−d)·params."""
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_decay)
  return TrainState(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state)
