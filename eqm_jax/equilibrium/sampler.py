"""Sampling: descend the landscape from noise until the gradient is small.

    gd    x ← x − η·f(x)
    nag   x ← x − η·f(x + μ·(x − x_prev))            (paper, section 3.3)
    optax x ← x + η·u, with u the update that the transformation makes of f

The paper's NAG looks ahead along the last displacement only and updates from x;
it is not classical Nesterov, whose velocity accumulates.

Adaptive compute (paper, algorithm 2): each sample goes on while ‖f‖₂ exceeds its
threshold and is then frozen, so its result does not depend on its neighbours.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqm_jax.equilibrium.field import as_pytree

RUNNING = -1
CONVERGED = 0  # ‖f‖ came down to the threshold
BUDGET = 1  # max_evaluations were spent first
DIVERGED = 2  # f or the next x was not finite; x is the last finite one

Rule = str | optax.GradientTransformation


@flax.struct.dataclass
class Result:
  """What a descent returns; all arrays in the order of x0."""

  x: jax.Array  # [B, ...], float32
  evaluations_B: jax.Array  # int32: calls of the field that each sample used
  norm_B: jax.Array  # float32: ‖f‖₂ at the sample's last evaluation
  status_B: jax.Array  # int32: CONVERGED, BUDGET or DIVERGED


@flax.struct.dataclass
class DescentState:
  """The loop's state. Finished samples keep theirs."""

  x: jax.Array  # [B, ...] the samples
  displacement: jax.Array  # [B, ...] x − x_prev, zero at the start
  rule_state: Any  # the optax state of each sample, leading axis B
  evaluations_B: jax.Array
  norm_B: jax.Array
  status_B: jax.Array


def descend(
  field_fn: Callable,
  x0: jax.Array,
  *,
  step_size: float,
  momentum: float = 0.0,
  rule: Rule = "nag",
  max_evaluations: int,
  threshold: float | jax.Array = 0.0,
) -> Result:
  """Descends `field_fn` from x0, each sample until its gradient is small.

  One jitted `lax.while_loop`. With a field that is a pytree (those of this
  package), it compiles once per shape and rule: weights, labels, step size,
  momentum, threshold and budget are arguments. A plain closure compiles once per
  closure.

  Args:
    field_fn: x [B, ...] → f [B, ...], uphill. The shape of x0 is the only one it sees.
    x0: where to start, [B, ...]; usually noise of unit variance.
    step_size: η > 0. The product λ·η·evaluations should be about 1.2 to 3, and
      η below 0.1 for the released c(γ), or the descent is unstable near the data.
    momentum: μ in [0, 1), for "nag" alone; 0 makes it "gd".
    rule: "gd", "nag", or an `optax.GradientTransformation` that is given f as the
      gradient, each sample on its own (vmapped); its updates are multiplied by
      `step_size`, so pass 1.0 with `optax.adam(1e-2)`.
    max_evaluations: the budget of each sample; the paper's "250 steps" is 249.
    threshold: g_min, one number or one per sample [B]. A sample stops, without a
      further step, at the first evaluation with ‖f‖₂ ≤ threshold. 0 never stops
      one, except where f is exactly zero. The paper uses 10 on 32×32×4 latents.

  Returns:
    A `Result`.

  Raises:
    ValueError: before compilation, for a value outside the ranges above.
  """
  x0 = _check(x0, step_size, momentum, rule, max_evaluations, threshold)
  threshold_B = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), x0.shape[:1])
  transformation = None if isinstance(rule, str) else rule
  return _descend(as_pytree(field_fn), x0, step_size, momentum, max_evaluations, threshold_B, transformation)


@functools.partial(jax.jit, static_argnames="transformation")
def _descend(field_fn, x0, step_size, momentum, max_evaluations, threshold_B, transformation) -> Result:
  B = x0.shape[0]
  state = DescentState(
    x=x0,
    displacement=jnp.zeros_like(x0),
    rule_state=jax.vmap(transformation.init)(x0) if transformation else (),
    evaluations_B=jnp.zeros(B, jnp.int32),
    norm_B=jnp.full(B, jnp.inf, jnp.float32),
    status_B=jnp.full(B, RUNNING, jnp.int32),
  )

  def running(state):
    return (state.status_B == RUNNING) & (state.evaluations_B < max_evaluations)

  def body(state):
    f = field_fn(state.x + momentum * state.displacement).astype(x0.dtype)
    return _advance(state, f, running(state), threshold_B, step_size, transformation)

  state = jax.lax.while_loop(lambda state: jnp.any(running(state)), body, state)
  status_B = jnp.where(state.status_B == RUNNING, BUDGET, state.status_B)
  return Result(x=state.x, evaluations_B=state.evaluations_B, norm_B=state.norm_B, status_B=status_B)


def _advance(state: DescentState, f, active_B, threshold_B, step_size, transformation) -> DescentState:
  """One step of the active samples, given f at their look-ahead points."""
  norm_B = jnp.sqrt(jnp.sum(f**2, axis=range(1, f.ndim)))
  converged_B = norm_B <= threshold_B
  if transformation:
    update, rule_state = jax.vmap(transformation.update)(f, state.rule_state, state.x)
  else:
    update, rule_state = -f, ()
  x_next = state.x + step_size * update
  finite_B = jnp.isfinite(norm_B) & jnp.all(jnp.isfinite(x_next), axis=range(1, x_next.ndim))
  status_B = jnp.where(finite_B, jnp.where(converged_B, CONVERGED, RUNNING), DIVERGED)
  moving_B = active_B & (status_B == RUNNING)

  def where(mask_B, new, old):
    return jnp.where(mask_B.reshape(mask_B.shape + (1,) * (new.ndim - 1)), new, old)

  return DescentState(
    x=where(moving_B, x_next, state.x),
    displacement=where(moving_B, x_next - state.x, state.displacement),
    rule_state=jax.tree.map(lambda new, old: where(moving_B, new, old), rule_state, state.rule_state),
    evaluations_B=state.evaluations_B + active_B,
    norm_B=where(active_B, norm_B.astype(jnp.float32), state.norm_B),
    status_B=where(active_B, status_B, state.status_B),
  )


def start_noise(key: jax.Array, index_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal noise [B, *shape]; sample i's depends on (key, index_B[i]) alone."""
  keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(index_B))
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)


def _check(x0, step_size, momentum, rule, max_evaluations, threshold) -> jax.Array:
  """Refuses what cannot work; returns x0 in the sampler's type, float32 or wider."""
  x0 = jnp.asarray(x0)
  if x0.ndim < 2 or not jnp.issubdtype(x0.dtype, jnp.floating):
    raise ValueError(f"x0 must be a floating-point array [B, ...], not {x0.dtype}{list(x0.shape)}")
  if not isinstance(rule, optax.GradientTransformation) and rule not in ("gd", "nag"):
    raise ValueError(f"rule {rule!r} is not known: give 'gd', 'nag' or an optax.GradientTransformation")
  if not step_size > 0:
    raise ValueError(f"step_size = {step_size} must be positive: the descent is x ← x − step_size·f")
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum = {momentum} must lie in [0, 1)")
  if momentum and rule != "nag":
    raise ValueError(f"momentum = {momentum} belongs to rule 'nag'; rule {rule!r} takes none")
  if max_evaluations < 1:
    raise ValueError(f"max_evaluations = {max_evaluations} must be at least 1")
  if np.shape(threshold) not in ((), x0.shape[:1]) or not np.all(np.asarray(threshold) >= 0):
    raise ValueError(f"threshold = {threshold} must be one number ≥ 0, or one for each of the {x0.shape[0]} samples")
  return x0.astype(jnp.promote_types(x0.dtype, jnp.float32))
