"""The training state, arrays only, and the optimizer that updates it."""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from eqm_jax.checks import at_least, in_interval, one_of
from eqm_jax.networks.dit import DiT


@flax.struct.dataclass
class TrainState:
  """Everything that a training step reads and writes."""

  step: jax.Array  # int32, number of updates so far
  params: Any
  ema_params: Any  # exponential moving average of params, which it starts at
  opt_state: Any


# Random numbers for one purpose never share a key with those for another.
STREAMS = {"parameters": 0, "steps": 1, "samples": 2}


def stream_key(seed: int, purpose: str) -> jax.Array:
  """The root key for one purpose; a step or a sample index is folded into it."""
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
  in_interval("optimizer.learning_rate", peak, 0, math.inf, open_low=True, open_high=True)
  in_interval("optimizer.warmup_steps", warmup, 0, steps, remedy="train.steps is the longest warm-up")
  one_of("optimizer.schedule", config.schedule, ("constant", "cosine"))
  rest = optax.constant_schedule(peak)
  if config.schedule == "cosine":
    rest = optax.cosine_decay_schedule(peak, max(1, steps - warmup))
  return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), rest], [warmup])


def make_optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
  """AdamW, after clipping of the gradient's global norm if `clip_norm` is a number.

  With `max_skipped_batches` a gradient that is not finite changes no parameter, until more than so many follow each
  other; the average still moves towards the parameters.

  Raises:
    ValueError: naming the key and the value.
  """
  if config.clip_norm is not None:
    remedy = "or None for no clipping"
    in_interval("optimizer.clip_norm", config.clip_norm, 0, math.inf, open_low=True, open_high=True, remedy=remedy)
  remedy = "with 0 the first gradient that is not finite stops the run"
  at_least("optimizer.max_skipped_batches", config.max_skipped_batches, 0, remedy)
  optimizer = optax.adamw(
    learning_rate_schedule(config, steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
  )
  if config.clip_norm is not None:
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
  if config.max_skipped_batches:
    optimizer = optax.apply_if_finite(optimizer, config.max_skipped_batches)
  return optimizer


def skipped_batches(opt_state: optax.ApplyIfFiniteState) -> jax.Array:
  """Number of batches that a run with optimizer.max_skipped_batches has skipped."""
  return opt_state.total_notfinite


def update(state: TrainState, gradient: Any, optimizer: optax.GradientTransformation, ema_decay: float) -> TrainState:
  """One optimizer step and one step of the average: ema ← d·ema + (1−d)·params."""
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_decay)
  return TrainState(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state)
