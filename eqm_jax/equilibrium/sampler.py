"""Sampling: descend the landscape from noise until the gradient is small.

How a sample moves is a rule (`rules.py`); here is when it stops. Adaptive compute
(EqM paper, algorithm 2): each sample goes on while ‖f‖₂ exceeds its threshold and is
then frozen, so its result does not depend on its neighbours.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqm_jax.equilibrium import rules
from eqm_jax.equilibrium.field import as_pytree
from eqm_jax.equilibrium.objective import per_sample

RUNNING = -1
CONVERGED = 0  # ‖f‖ came down to the threshold
BUDGET = 1  # max_evaluations were spent first
DIVERGED = 2  # f or the next x was not finite; x is the last finite one

# λ·η·evaluations of step_size="auto": the ideal path is at γ = 0.8 after 0.4 of them.
AUTO_LENGTH = 2.0

# Keys of a sample besides its start noise, folded in where no sample index reaches.
RESTART, WALK = 2**32 - 1, 2**32 - 2


@flax.struct.dataclass
class Result:
  """What a descent returns; all arrays in the order of the samples."""

  x: jax.Array  # [B, ...], float32
  evaluations_B: jax.Array  # int32: calls of the field that each sample used; a guided call counts once
  norm_B: jax.Array  # float32: ‖f‖₂ at the sample's last evaluation
  status_B: jax.Array  # int32: CONVERGED, BUDGET or DIVERGED
  restarts_B: jax.Array  # int32: how often a diverged sample began again
  record: Any = None  # what `record_fn` returned at `record_at`, each leaf [R, B, ...]


@flax.struct.dataclass
class DescentState:
  """The samples on their way. Finished ones keep their state."""

  x: jax.Array  # [B, ...]
  memory: Any  # the rule's memory of each sample, leading axis B
  index_B: jax.Array  # which sample: fixes its random numbers
  threshold_B: jax.Array
  evaluations_B: jax.Array
  norm_B: jax.Array
  status_B: jax.Array
  restarts_B: jax.Array


@flax.struct.dataclass
class Policy:
  """What all samples of a descent share. The rule is compiled in; the numbers are arguments."""

  settings: rules.Settings
  key: jax.Array
  max_evaluations: jax.Array
  min_evaluations: jax.Array
  max_restarts: jax.Array
  multiplier: jax.Array
  rule: rules.Rule = flax.struct.field(pytree_node=False)


def descend(
  field_fn: Callable,
  x0: jax.Array,
  *,
  step_size: float | str | Callable,
  momentum: float = 0.0,
  rule: str | optax.GradientTransformation = "nag",
  max_evaluations: int,
  threshold: float | jax.Array = 0.0,
  min_evaluations: int = 0,
  multiplier: float = 1.0,
  temperature: float = 0.0,
  max_restarts: int = 0,
  key: jax.Array | None = None,
  index_B: jax.Array | None = None,
  record_at: Sequence[int] = (),
  record_fn: Callable | None = None,
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
      A function gives η from the number of a sample's evaluations so far. "auto" is
      2/(λ·max_evaluations), for a few steps; give λ as `multiplier`.
    momentum: μ in [0, 1), for "nag" and "nesterov"; 0 makes them "gd".
    rule: "gd", "nag", "nesterov", "adam", "lbfgs", "langevin", or an
      `optax.GradientTransformation` that is given f as the gradient; its updates are
      multiplied by `step_size`, so pass 1.0 with `optax.adam(1e-2)`. Any memory is
      that of one sample.
    max_evaluations: the budget of each sample; the paper's "250 steps" is 249.
    threshold: g_min, one number or one per sample [B]. A sample stops, without a
      further step, at the first evaluation with ‖f‖₂/multiplier ≤ threshold. 0 never
      stops one. The paper uses 10 on 32×32×4 latents.
    min_evaluations: no sample stops at its threshold before this many.
    multiplier: λ of the field. With it the threshold and "auto" mean the same for
      fields trained with another λ; 1 compares ‖f‖ itself.
    temperature: T ≥ 0 of "langevin"; its noise depends on (key, index, evaluation).
    max_restarts: how often a sample that diverges begins again from fresh noise;
      its evaluations go on counting.
    key: for "langevin" and restarts; sample i's numbers depend on (key, index_B[i]).
    index_B: the indices of the samples, 0 to B−1 if not given.
    record_at: numbers of evaluations, ascending; 0 is the start.
    record_fn: (x [B, ...], norm [B]) → arrays [B, ...] to record then, such as an
      energy; by default both. The norm at 0 is infinite: nothing is known yet.

  Returns:
    A `Result`.

  Raises:
    ValueError: before compilation, for a value outside the ranges above.
  """
  x0 = checked_start(x0)
  B = x0.shape[0]
  threshold_B = checked_threshold(threshold, B)
  policy = make_policy(
    rule, step_size, momentum, temperature, key, max_evaluations, min_evaluations, max_restarts, multiplier,
    example=jax.ShapeDtypeStruct(x0.shape[1:], x0.dtype),
  )  # fmt: skip
  record_at = tuple(int(k) for k in record_at)
  if list(record_at) != sorted(set(record_at)) or (
    record_at and not 0 <= record_at[0] <= record_at[-1] <= max_evaluations
  ):
    raise ValueError(
      f"record_at = {record_at} must ascend from 0 or more to at most max_evaluations = {max_evaluations}"
    )
  index_B = jnp.arange(B) if index_B is None else index_B
  at_R = jnp.asarray(record_at, jnp.int32)
  return _descend(as_pytree(field_fn), x0, index_B, threshold_B, policy, at_R, record_fn or _both)


@functools.partial(jax.jit, static_argnames="record_fn")
def _descend(field_fn, x0, index_B, threshold_B, policy, at_R, record_fn) -> Result:
  state = start(x0, index_B, threshold_B, policy.rule)
  R = len(at_R)

  def recorded(record, state, steps):
    """Writes the rows that belong to this number of steps: at most one, usually none."""
    row = jnp.where(at_R == steps, jnp.arange(R), R).min()
    now = record_fn(state.x, state.norm_B)
    return jax.tree.map(lambda rows, value: rows.at[row].set(value, mode="drop"), record, now)

  record = None
  if R:
    shapes = jax.eval_shape(record_fn, state.x, state.norm_B)
    record = jax.tree.map(lambda leaf: jnp.zeros((R, *leaf.shape), leaf.dtype), shapes)
    record = recorded(record, state, 0)

  def body(carry):
    state, record, steps = carry
    state = advance(state, field_fn(look(state, policy)), policy)
    if R:
      due = jnp.any(at_R == steps + 1)
      record = jax.lax.cond(due, recorded, lambda record, *_: record, record, state, steps + 1)
    return state, record, steps + 1

  state, record, steps = jax.lax.while_loop(lambda carry: jnp.any(is_running(carry[0])), body, (state, record, 0))
  if R:  # whatever lies beyond the end is the end
    final = record_fn(state.x, state.norm_B)
    late_R = at_R > steps
    record = jax.tree.map(lambda rows, value: jnp.where(per_sample(late_R, rows), value, rows), record, final)
  return Result(state.x, state.evaluations_B, state.norm_B, state.status_B, state.restarts_B, record)


def start(x0: jax.Array, index_B: jax.Array, threshold_B: jax.Array, rule: rules.Rule) -> DescentState:
  """Samples that have not moved yet."""
  zeros_B = jnp.zeros(x0.shape[0], jnp.int32)
  return DescentState(
    x=x0,
    memory=jax.vmap(rule.init)(x0),
    index_B=index_B.astype(jnp.int32),
    threshold_B=threshold_B,
    evaluations_B=zeros_B,
    norm_B=jnp.full(x0.shape[0], jnp.inf, jnp.float32),
    status_B=zeros_B + RUNNING,
    restarts_B=zeros_B,
  )


def is_running(state: DescentState) -> jax.Array:
  """Which samples still move, [B]."""
  return state.status_B == RUNNING


def look(state: DescentState, policy: Policy) -> jax.Array:
  """Where the field is evaluated next, [B, ...]."""
  return jax.vmap(policy.rule.look, in_axes=(0, 0, None))(state.x, state.memory, policy.settings)


def advance(state: DescentState, f: jax.Array, policy: Policy) -> DescentState:
  """The step rule: one step of the running samples, given f where they looked."""
  if f.shape != state.x.shape:
    raise ValueError(
      f"field_fn answers an array of shape {f.shape} to samples of shape {state.x.shape}: it must be the same"
    )
  f = f.astype(state.x.dtype)
  running_B = is_running(state)
  evaluations_B = state.evaluations_B + running_B
  norm_B = jnp.sqrt(jnp.sum(f**2, axis=range(1, f.ndim))).astype(jnp.float32)

  keys_B = None
  if policy.rule is rules.RULES["langevin"]:
    keys_B = jax.vmap(jax.random.fold_in)(sample_keys(policy.key, WALK, state.index_B), state.evaluations_B)
  step_size_B = jnp.broadcast_to(policy.settings.step_size(state.evaluations_B), evaluations_B.shape).astype(f.dtype)
  x_next, memory = jax.vmap(policy.rule.move, in_axes=(0, 0, 0, 0, None, 0))(
    state.x, f, state.memory, step_size_B, policy.settings, keys_B
  )
  finite_B = jnp.isfinite(norm_B) & jnp.all(jnp.isfinite(x_next), axis=range(1, f.ndim))
  status_B = stop(evaluations_B, norm_B, state.threshold_B, policy)
  # A sample that stops takes no step, so it does not matter where the step would have led.
  status_B = jnp.where(finite_B | (status_B == CONVERGED), status_B, DIVERGED)

  # At its threshold a sample stays where the gradient was found small; at its budget it takes the last step.
  moved_B = running_B & (status_B != CONVERGED) & (status_B != DIVERGED)
  state = state.replace(
    x=where(moved_B, x_next, state.x),
    memory=where(moved_B, memory, state.memory),
    evaluations_B=evaluations_B,
    norm_B=jnp.where(running_B, norm_B, state.norm_B),
    status_B=jnp.where(running_B, status_B, state.status_B),
  )
  return _restart(state, running_B & (status_B == DIVERGED), policy)


def stop(evaluations_B: jax.Array, norm_B: jax.Array, threshold_B: jax.Array, policy: Policy) -> jax.Array:
  """The stop rule: the status of samples after an evaluation, [B]."""
  small_B = (threshold_B > 0) & (norm_B / policy.multiplier <= threshold_B)
  small_B &= evaluations_B >= policy.min_evaluations
  spent_B = evaluations_B >= policy.max_evaluations
  return jnp.where(small_B, CONVERGED, jnp.where(spent_B, BUDGET, RUNNING))


def start_noise(key: jax.Array, index_B: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Standard normal noise [B, *shape]; sample i's depends on (key, index_B[i]) alone."""
  keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(index_B))
  return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys_B)


def where(mask_B: jax.Array, new: Any, old: Any) -> Any:
  """Takes whole samples from one of two trees of [B, ...] arrays."""
  return jax.tree.map(lambda n, o: jnp.where(per_sample(mask_B, n), n, o), new, old)


def make_policy(
  rule, step_size, momentum, temperature, key, max_evaluations, min_evaluations, max_restarts, multiplier, example
) -> Policy:
  """Checks and packs what a descent was asked for; `example` is the shape of one sample."""
  _check_numbers(max_evaluations, min_evaluations, multiplier, max_restarts)
  resolved = rules.resolve(rule, momentum, temperature, example)
  if key is None and (rule == "langevin" or max_restarts):
    raise ValueError("rule 'langevin' and max_restarts draw random numbers: pass key=jax.random.key(...)")
  if isinstance(step_size, str):
    if step_size != "auto":
      raise ValueError(f"step_size = {step_size!r} is neither a number, a function nor 'auto'")
    step_size = AUTO_LENGTH / (multiplier * max_evaluations)
  if callable(step_size):
    schedule = as_pytree(step_size)
  elif not step_size > 0:
    raise ValueError(f"step_size = {step_size} must be positive: the descent is x ← x − step_size·f")
  else:
    schedule = jax.tree_util.Partial(_constant, jnp.asarray(step_size, example.dtype))
  return Policy(
    settings=rules.Settings(schedule, jnp.asarray(momentum, example.dtype), jnp.asarray(temperature, example.dtype)),
    key=jax.random.key(0) if key is None else key,  # the first is never used
    max_evaluations=jnp.asarray(max_evaluations, jnp.int32),
    min_evaluations=jnp.asarray(min_evaluations, jnp.int32),
    max_restarts=jnp.asarray(max_restarts, jnp.int32),
    multiplier=jnp.asarray(multiplier, jnp.float32),
    rule=resolved,
  )


def checked_start(x0: jax.Array) -> jax.Array:
  """x0 in the sampler's type, float32 or wider."""
  x0 = jnp.asarray(x0)
  if x0.ndim < 2 or not jnp.issubdtype(x0.dtype, jnp.floating):
    raise ValueError(f"x0 must be a floating-point array [B, ...], not {x0.dtype}{list(x0.shape)}")
  return x0.astype(jnp.promote_types(x0.dtype, jnp.float32))


def checked_threshold(threshold: float | jax.Array, count: int) -> jax.Array:
  """The threshold of each of `count` samples."""
  if np.shape(threshold) not in ((), (count,)) or not np.all(np.asarray(threshold) >= 0):
    raise ValueError(f"threshold = {threshold} must be one number ≥ 0, or one for each of the {count} samples")
  return jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (count,))


def _check_numbers(max_evaluations: int, min_evaluations: int, multiplier: float, max_restarts: int):
  if max_evaluations < 1:
    raise ValueError(f"max_evaluations = {max_evaluations} must be at least 1")
  if not 0 <= min_evaluations <= max_evaluations:
    raise ValueError(f"min_evaluations = {min_evaluations} must lie between 0 and max_evaluations = {max_evaluations}")
  if not multiplier > 0:
    raise ValueError(f"multiplier = {multiplier} must be positive: it is λ of the field")
  if max_restarts < 0:
    raise ValueError(f"max_restarts = {max_restarts} must not be negative")


def _restart(state: DescentState, diverged_B: jax.Array, policy: Policy) -> DescentState:
  """Diverged samples begin again from other noise, while they may and have evaluations left."""
  again_B = diverged_B & (state.restarts_B < policy.max_restarts) & (state.evaluations_B < policy.max_evaluations)

  def begin_again(state):
    keys_B = jax.vmap(jax.random.fold_in)(sample_keys(policy.key, RESTART, state.index_B), state.restarts_B)
    x0 = jax.vmap(lambda key: jax.random.normal(key, state.x.shape[1:], state.x.dtype))(keys_B)
    return state.replace(
      x=where(again_B, x0, state.x),
      memory=where(again_B, jax.vmap(policy.rule.init)(x0), state.memory),
      status_B=jnp.where(again_B, RUNNING, state.status_B),
      restarts_B=state.restarts_B + again_B,
    )

  return jax.lax.cond(jnp.any(again_B), begin_again, lambda state: state, state)


def sample_keys(key: jax.Array, purpose: int, index_B: jax.Array) -> jax.Array:
  """Keys for what a sample draws besides its start noise: RESTART or WALK."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, jnp.uint32(purpose)), index_B)


def _constant(step_size, evaluations_B):
  return step_size


def _both(x, norm_B):
  return {"x": x, "norm": norm_B}
