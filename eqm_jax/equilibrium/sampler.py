"""Sampling: descend the landscape from noise until the gradient is small.

How a sample moves is its update rule (`update_rules.py`); here is when it stops. Adaptive compute
(EqM paper, algorithm 2): each sample goes on while ‖f‖₂ exceeds its threshold and is
then frozen, so its result does not depend on its neighbours. Or it goes on while the noise
level γ̂ that the field reads off its network (`noise_level.py`) is below the threshold.
"""

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from eqm_jax import checks
from eqm_jax.equilibrium import meshes, reports, update_rules
from eqm_jax.equilibrium.field import with_labels
from eqm_jax.equilibrium.objective import Schedule, per_sample
from eqm_jax.equilibrium.pytrees import Scalar, ShortRepr, as_pytree, concrete, is_traced


class Status(enum.IntEnum):
  """How a sample ended."""

  RUNNING = -1
  CONVERGED = 0  # ‖f‖ came down to the threshold, or γ̂ rose to it; of `integrate`, the sample arrived
  BUDGET = 1  # max_nfe were spent first; of `integrate`, too many steps
  DIVERGED = 2  # f or the next x was not finite; x is the last finite one


# What a threshold is compared with.
STOPS = ("norm", "gamma")

# λ·η·NFE of step_size="auto", for the released c(γ): the ideal trajectory is at γ = 0.8 after 0.4 of them.
AUTO_LENGTH = 2.0
# γ of the ideal trajectory at the end, and the longest length for a c(γ) that never brings it there.
ARRIVED, LONGEST = 1 - 5e-4, 8.0

# Keys of a sample besides its start noise, folded in where no sample index reaches.
RESTART, WALK = 2**32 - 1, 2**32 - 2


@flax.struct.dataclass(eq=False, repr=False)
class Result(ShortRepr):
  """Samples, and how they were reached; all arrays in the order of the samples."""

  x: jax.Array  # [B, ...], float32
  nfe: jax.Array  # int32 [B]: calls of the field that each sample used; a guided call counts once
  norm: jax.Array  # float32 [B]: ‖f‖₂ at the sample's last evaluation; NaN from `integrate`
  status: jax.Array  # int32 [B]: values of `Status`
  restarts: jax.Array  # int32 [B]: how often a diverged sample began again
  record: Any = None  # of `record_fn` at `record_at`, each leaf [R, B, ...]
  executed_nfe: jax.Array | None = None  # int32, of `descend_stream`: samples that the field saw, idle slots included
  gamma: jax.Array | None = None  # float32 [B], with stop="gamma": γ̂ at the sample's last evaluation


@flax.struct.dataclass
class DescentState:
  """The loop state of samples that are descending. Finished ones keep theirs."""

  x: jax.Array  # [B, ...]
  rule_state: Any  # the update rule's state of each sample, leading axis B
  index: jax.Array  # which sample: fixes its random numbers
  threshold: jax.Array
  nfe: jax.Array
  norm: jax.Array
  status: jax.Array
  restarts: jax.Array
  gamma: jax.Array | None = None  # γ̂, with stop="gamma"


@flax.struct.dataclass
class Policy:
  """Options that all samples of a descent share. The update rule and `stop` are compiled in; numbers are arguments."""

  settings: update_rules.Settings
  key: jax.Array
  max_nfe: jax.Array
  min_nfe: jax.Array
  max_restarts: jax.Array
  multiplier: jax.Array
  rule: update_rules.UpdateRule = flax.struct.field(pytree_node=False)
  stop: str = flax.struct.field(pytree_node=False)


def descend(
  field: Callable,
  x0: jax.Array,
  labels: Any = None,
  *,
  step_size: Scalar | str | Callable,
  max_nfe: int,
  momentum: Scalar = 0.0,
  rule: str | update_rules.UpdateRule | optax.GradientTransformation = "gd",
  threshold: Scalar = 0.0,
  stop: str = "norm",
  min_nfe: int = 0,
  multiplier: Scalar = 1.0,
  temperature: Scalar = 0.0,
  max_restarts: int = 0,
  key: jax.Array | None = None,
  index: jax.Array | None = None,
  record_at: Sequence[int] = (),
  record_fn: Callable | None = None,
  progress: reports.Progress | None = None,
) -> Result:
  """Descent from x0 along a field, each sample until its gradient is small.

  One jitted `lax.while_loop`. With a field that is a pytree (those of this
  package), it compiles once per shape and rule: weights, labels, step size,
  momentum, threshold and budget are arguments. A plain closure compiles once per
  closure.

  It can be jitted, vmapped over x0 and over every number below, put into `shard_map`, and differentiated forward
  (`jax.jvp`, `jax.jacfwd`), but not in reverse: the number of steps of a while_loop is not known beforehand.

  If x0 lies on a mesh, so does the result, with axes of either type (Auto or Explicit). What the field holds on other
  devices, such as parameters loaded onto one, is replicated over the mesh with each call; to do that once, give it
  replicated already. Parameters that are split over the same mesh stay split.

  Args:
    field: x [B, ...] → f [B, ...], uphill; with `labels`, (x, labels) → f. The shape of x0 is the only one it sees.
      With stop="gamma" it returns (f, γ̂ [B]), as `eqm_jax.field(..., readout=...)` does.
    x0: where to start, [B, ...]; usually noise of unit variance.
    labels: int [B], or what the field takes; None for a field that has its labels bound.
    step_size: η > 0. The product λ·η·NFE should be about 1.2 to 3, and
      η below 0.1 for the released c(γ), or the descent is unstable near the data.
      A function gives η from a sample's NFE so far. "auto" is
      2/(λ·max_nfe), for a few steps; give λ as `multiplier`. For another c(γ) give
      auto_length(schedule)/(λ·max_nfe).
    max_nfe: the budget of each sample; the paper's "250 steps" is 249.
    momentum: μ in (0, 1), for "nag" and "nesterov".
    rule: "gd", "nag", "nesterov", "adam", "lbfgs", "langevin", an
      `equilibrium.update_rules.UpdateRule` of your own, or an
      `optax.GradientTransformation` that takes f as the gradient; its updates are
      multiplied by `step_size`, so pass 1.0 with `optax.adam(1e-2)`. Any state is
      that of one sample.
    threshold: g_min, one number or one per sample [B]. A sample stops, without a
      further step, at the first evaluation with ‖f‖₂/multiplier ≤ threshold. 0 never
      stops one. The paper uses 10 on 32×32×4 latents.
    stop: "norm", or "gamma": the threshold is in (0, 1), and a sample stops where γ̂ ≥ threshold. Such a threshold
      is in units of γ, whatever the dimension and λ.
    min_nfe: no sample stops at its threshold before this many.
    multiplier: λ of the field. With it the threshold and "auto" mean the same for
      fields trained with another λ; 1 compares ‖f‖ itself.
    temperature: T ≥ 0 of "langevin"; its noise depends on (key, index, NFE so far).
    max_restarts: how often a sample that diverges begins again from fresh noise;
      its NFE goes on counting.
    key: for "langevin" and restarts; sample i's numbers depend on (key, index[i]).
    index: the indices of the samples [B]; None: 0 to B−1.
    record_at: values of NFE, ascending; 0 is the start.
    record_fn: (x [B, ...], norm [B]) → arrays [B, ...] to record then, such as an
      energy; by default both. The norm at 0 is infinite: no field is evaluated yet.
    progress: takes the number of network calls since it was last called, while the
      descent goes on, such as `update` of a `tqdm.auto.tqdm(total=max_nfe)`. None costs
      nothing; another function compiles nothing anew.

  Raises:
    ValueError: before compilation, for a value outside the ranges above. Traced values are not checked.
  """
  x0 = check_start(x0)
  B = x0.shape[0]
  threshold_B = check_threshold(threshold, B, stop)
  policy = make_policy(
    jax.ShapeDtypeStruct(x0.shape[1:], x0.dtype), rule=rule, step_size=step_size, momentum=momentum,
    temperature=temperature, key=key, max_nfe=max_nfe, min_nfe=min_nfe, max_restarts=max_restarts,
    multiplier=multiplier, stop=stop,
  )  # fmt: skip
  record_at = _check_record_at(record_at, max_nfe)
  index_B = jnp.arange(B) if index is None else jnp.asarray(index)
  run = functools.partial(_descend, record_fn=record_fn or _both)
  arguments = (with_labels(field, labels), (x0, index_B, threshold_B), policy, jnp.asarray(record_at, jnp.int32))
  axes = meshes.spec_of(x0)
  batch = PartitionSpec(*axes[:1])
  specs = Result(axes, batch, batch, batch, batch, PartitionSpec(None, *axes[:1]) if record_at else None)
  specs = specs.replace(gamma=batch if stop == "gamma" else None)
  return reports.reporting(
    progress, max_nfe, lambda reporter: meshes.call(run, (*arguments, reporter), like=x0, out_specs=specs)
  )


def auto_length(schedule: Schedule) -> float:
  """λ·η·NFE that brings the ideal trajectory, dγ = η·c a step, as near to the data as 2 do with the released c(γ)."""
  length = AUTO_LENGTH * schedule.inverse_integral(ARRIVED) / Schedule().inverse_integral(ARRIVED)
  return min(length, LONGEST)


@functools.partial(jax.jit, static_argnames="record_fn")
def _descend(field, samples, policy, record_at, reporter, *, record_fn) -> Result:
  state = start(*samples, policy)
  R = len(record_at)

  def recorded(record, state, steps):
    """Writes the rows that belong to this number of steps: at most one, usually none."""
    row = jnp.where(record_at == steps, jnp.arange(R), R).min()
    now = record_fn(state.x, state.norm)
    return jax.tree.map(lambda rows, value: rows.at[row].set(value, mode="drop"), record, now)

  record = None
  if R:
    shapes = jax.eval_shape(record_fn, state.x, state.norm)
    record = jax.tree.map(lambda leaf: jnp.zeros((R, *leaf.shape), leaf.dtype), shapes)
    record = recorded(record, state, 0)

  def body(carry):
    state, record, steps = carry
    state = advance(state, field(lookahead(state, policy)), policy)
    if R:
      due = jnp.any(record_at == steps + 1)
      record = jax.lax.cond(due, recorded, lambda record, *_: record, record, state, steps + 1)
    reports.report(reporter, steps, steps + 1)
    return state, record, steps + 1

  state, record, steps = jax.lax.while_loop(lambda carry: jnp.any(is_running(carry[0])), body, (state, record, 0))
  reports.report_rest(reporter, steps)
  if R:  # whatever lies beyond the end is the end
    final = record_fn(state.x, state.norm)
    late_R = record_at > steps
    record = jax.tree.map(lambda rows, value: jnp.where(per_sample(late_R, rows), value, rows), record, final)
  return Result(state.x, state.nfe, state.norm, state.status, state.restarts, record, gamma=state.gamma)


def start(x0: jax.Array, index: jax.Array, threshold: jax.Array, policy: Policy) -> DescentState:
  """The loop state of samples that have not moved yet."""
  zeros_B = jnp.zeros(x0.shape[0], jnp.int32)
  state = DescentState(
    x=x0,
    rule_state=jax.vmap(policy.rule.init)(x0),
    index=index.astype(jnp.int32),
    threshold=threshold,
    nfe=zeros_B,
    norm=jnp.full(x0.shape[0], jnp.inf, jnp.float32),
    status=zeros_B + Status.RUNNING,
    restarts=zeros_B,
    gamma=jnp.zeros(x0.shape[0], jnp.float32) if policy.stop == "gamma" else None,
  )
  return meshes.vary_as(x0, state)


def is_running(state: DescentState) -> jax.Array:
  """Which samples still move, [B]."""
  return state.status == Status.RUNNING


def lookahead(state: DescentState, policy: Policy) -> jax.Array:
  """Where the field is evaluated next, [B, ...]."""
  return jax.vmap(policy.rule.lookahead, in_axes=(0, 0, None))(state.x, state.rule_state, policy.settings)


def advance(state: DescentState, evaluated: Any, policy: Policy) -> DescentState:
  """One step of the running samples, given what the field returned at their lookahead: f, or (f, γ̂)."""
  f, gamma_B = _split(evaluated, policy)
  if f.shape != state.x.shape:
    raise ValueError(f"the field returned shape {f.shape} for samples of shape {state.x.shape}: it must be the same")
  f = f.astype(state.x.dtype)
  running_B = is_running(state)
  nfe_B = state.nfe + running_B
  norm_B = jnp.sqrt(jnp.sum(f**2, axis=range(1, f.ndim))).astype(jnp.float32)

  keys_B = None
  if policy.rule is update_rules.RULES["langevin"]:
    keys_B = jax.vmap(jax.random.fold_in)(sample_keys(policy.key, WALK, state.index), state.nfe)
  step_size_B = jnp.broadcast_to(policy.settings.step_size(state.nfe), nfe_B.shape).astype(f.dtype)
  x_next, rule_state = jax.vmap(policy.rule.update, in_axes=(0, 0, 0, 0, None, 0))(
    state.x, f, state.rule_state, step_size_B, policy.settings, keys_B
  )
  finite_B = jnp.isfinite(norm_B) & jnp.all(jnp.isfinite(x_next), axis=range(1, f.ndim))
  status_B = stop(nfe_B, is_reached(norm_B, gamma_B, state.threshold, policy), policy)
  # A sample that stops takes no step, so it does not matter where the step would have led.
  status_B = jnp.where(finite_B | (status_B == Status.CONVERGED), status_B, Status.DIVERGED)

  # At its threshold a sample stays where the gradient was found small; at its budget it takes the last step.
  moved_B = running_B & (status_B != Status.CONVERGED) & (status_B != Status.DIVERGED)
  state = state.replace(
    x=where(moved_B, x_next, state.x),
    rule_state=where(moved_B, rule_state, state.rule_state),
    nfe=nfe_B,
    norm=jnp.where(running_B, norm_B, state.norm),
    status=jnp.where(running_B, status_B, state.status),
    gamma=None if gamma_B is None else jnp.where(running_B, gamma_B, state.gamma),
  )
  return _restart(state, running_B & (status_B == Status.DIVERGED), policy)


def is_reached(norm: jax.Array, gamma: jax.Array | None, threshold: jax.Array, policy: Policy) -> jax.Array:
  """The stop rule: which samples are at their thresholds, [B]."""
  if policy.stop == "gamma":
    return (gamma >= threshold) & jnp.isfinite(norm)  # of a sample that diverges, γ̂ may be anything
  return (threshold > 0) & (norm / policy.multiplier <= threshold)


def stop(nfe: jax.Array, reached: jax.Array, policy: Policy) -> jax.Array:
  """The status of samples after an evaluation, [B]."""
  reached_B = reached & (nfe >= policy.min_nfe)
  spent_B = nfe >= policy.max_nfe
  return jnp.where(reached_B, Status.CONVERGED, jnp.where(spent_B, Status.BUDGET, Status.RUNNING))


def _split(evaluated: Any, policy: Policy) -> tuple[jax.Array, jax.Array | None]:
  """(f, γ̂), or (f, None) where samples stop by ‖f‖, of what a field returned."""
  is_pair = isinstance(evaluated, tuple) and len(evaluated) == 2
  if policy.stop == "gamma" and not is_pair:
    raise ValueError(
      "stop = 'gamma' needs a field that returns (f, γ̂), but this one returned f alone: make it with "
      "eqm_jax.field(..., readout=...), or stop by 'norm'"
    )
  if policy.stop == "norm" and is_pair:
    raise ValueError("the field returned (f, γ̂), but stop = 'norm' takes f alone: pass stop='gamma'")
  f, gamma_B = evaluated if is_pair else (evaluated, None)
  if is_pair and gamma_B.shape != f.shape[:1]:
    raise ValueError(f"the field returned γ̂ of shape {gamma_B.shape} for {len(f)} samples: it must be one number each")
  return f, gamma_B if gamma_B is None else gamma_B.astype(jnp.float32)


def start_noise(key: jax.Array, index: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Standard normal noise [B, *shape]; sample i's depends on (key, index[i]) alone."""
  keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(index))
  return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys_B)


def where(mask: jax.Array, new: Any, old: Any) -> Any:
  """Takes whole samples from one of two trees of [B, ...] arrays."""
  return jax.tree.map(lambda n, o: jnp.where(per_sample(mask, n), n, o), new, old)


def make_policy(
  example: jax.ShapeDtypeStruct,
  *,
  rule: str | update_rules.UpdateRule | optax.GradientTransformation,
  step_size: Scalar | str | Callable,
  momentum: Scalar,
  temperature: Scalar,
  key: jax.Array | None,
  max_nfe: int,
  min_nfe: int,
  max_restarts: int,
  multiplier: Scalar,
  stop: str,
) -> Policy:
  """Checks and packs the options of a descent; `example` is the shape of one sample."""
  _check_numbers(*map(concrete, (max_nfe, min_nfe, multiplier, max_restarts)))
  resolved = update_rules.resolve(rule, momentum, temperature, example)
  if key is None and (rule == "langevin" or is_traced(max_restarts) or concrete(max_restarts)):
    raise ValueError("rule 'langevin' and max_restarts draw random numbers: pass key=jax.random.key(...)")
  settings = update_rules.Settings(
    _step_size_schedule(step_size, multiplier, max_nfe, example.dtype),
    jnp.asarray(momentum, example.dtype),
    jnp.asarray(temperature, example.dtype),
  )
  return Policy(
    settings=settings,
    key=jax.random.key(0) if key is None else key,  # the first is never used
    max_nfe=jnp.asarray(max_nfe, jnp.int32),
    min_nfe=jnp.asarray(min_nfe, jnp.int32),
    max_restarts=jnp.asarray(max_restarts, jnp.int32),
    multiplier=jnp.asarray(multiplier, jnp.float32),
    rule=resolved,
    stop=stop,
  )


def _step_size_schedule(step_size, multiplier: Scalar, max_nfe: int, dtype: Any) -> Callable:
  """η as a function of the NFE so far."""
  if callable(step_size):
    return as_pytree(step_size)
  if isinstance(step_size, str):
    if step_size != "auto":
      raise ValueError(f"step_size = {step_size!r} is neither a number, a function nor 'auto': give one of these")
    step_size = AUTO_LENGTH / (multiplier * max_nfe)
  elif not is_traced(step_size) and not concrete(step_size) > 0:
    raise ValueError(f"step_size = {step_size} must be positive: the descent is x ← x − step_size·f")
  return jax.tree_util.Partial(_constant, jnp.asarray(step_size, dtype))


def check_start(x0: jax.Array) -> jax.Array:
  """x0 in the sampler's type, float32 or wider."""
  x0 = jnp.asarray(x0)
  if x0.ndim < 2 or not jnp.issubdtype(x0.dtype, jnp.floating):
    raise ValueError(f"x0 is {x0.dtype}{list(x0.shape)}, but must be a floating-point array [B, ...]: convert it")
  return x0.astype(jnp.promote_types(x0.dtype, jnp.float32))


def check_threshold(threshold: Scalar, count: int, stop: str = "norm") -> jax.Array:
  """The threshold of each of `count` samples."""
  checks.one_of("stop", stop, STOPS)
  values = np.asarray([] if is_traced(threshold) else threshold)
  if stop == "gamma" and not np.all((values > 0) & (values < 1)):
    raise ValueError(
      f"threshold = {threshold} must be in (0, 1): with stop = 'gamma' a sample stops where γ̂ reaches it; give one "
      "such as 0.95"
    )
  if np.shape(threshold) not in ((), (count,)) or not np.all(values >= 0):
    raise ValueError(f"threshold = {threshold} must be one number ≥ 0, or one for each of the {count} samples")
  return jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (count,))


def _check_numbers(max_nfe: int, min_nfe: int, multiplier: Scalar, max_restarts: int):
  checks.at_least("max_nfe", max_nfe, 1)
  checks.at_least("min_nfe", min_nfe, 0)
  if not is_traced(min_nfe, max_nfe) and min_nfe > max_nfe:
    raise ValueError(f"min_nfe = {min_nfe} must be at most max_nfe = {max_nfe}: lower it, or raise max_nfe")
  checks.in_interval("multiplier", multiplier, 0, np.inf, open_low=True, open_high=True, remedy="it is λ of the field")
  checks.at_least("max_restarts", max_restarts, 0)


def _check_record_at(record_at: Sequence[int], max_nfe: int) -> tuple[int, ...]:
  record_at = tuple(int(k) for k in record_at)
  is_late = record_at and not is_traced(max_nfe) and record_at[-1] > concrete(max_nfe)
  if list(record_at) != sorted(set(record_at)) or (record_at and record_at[0] < 0) or is_late:
    raise ValueError(f"record_at = {record_at} must ascend from 0 or more to at most max_nfe = {max_nfe}")
  return record_at


def _restart(state: DescentState, diverged_B: jax.Array, policy: Policy) -> DescentState:
  """Diverged samples begin again from other noise, while restarts and NFE are left."""
  again_B = diverged_B & (state.restarts < policy.max_restarts) & (state.nfe < policy.max_nfe)

  def begin_again(state):
    keys_B = jax.vmap(jax.random.fold_in)(sample_keys(policy.key, RESTART, state.index), state.restarts)
    x0 = jax.vmap(lambda key: jax.random.normal(key, state.x.shape[1:], state.x.dtype))(keys_B)
    return state.replace(
      x=where(again_B, x0, state.x),
      rule_state=where(again_B, jax.vmap(policy.rule.init)(x0), state.rule_state),
      status=jnp.where(again_B, Status.RUNNING, state.status),
      restarts=state.restarts + again_B,
    )

  return jax.lax.cond(jnp.any(again_B), begin_again, lambda state: state, state)


def sample_keys(key: jax.Array, purpose: int, index: jax.Array) -> jax.Array:
  """Keys for the random numbers of samples besides their start noise: RESTART or WALK."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, jnp.uint32(purpose)), index)


def _constant(step_size, nfe):
  return step_size


def _both(x, norm):
  return {"x": x, "norm": norm}
