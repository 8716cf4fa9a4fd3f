"""The field as a differential equation, integrated by diffrax.

    dx/dγ = −f(x)        from noise at γ = 0 to data at γ = 1     (EqM: the field needs no γ)
    dx/dγ = −f(x, γ)     flow matching, where −f is the velocity v

One Euler step of h is one step of gradient descent with η = h. With step control every
sample is an equation of its own, so that it does not depend on its neighbours.

For flow matching there is also the stochastic equation with the same marginals
(Ma et al. 2024, with diffusion w = s·(1−γ)):

    dx = (v − s/2·(x − γ·v))·dγ + √(s·(1−γ))·dW,     x − γ·v = E[ε | x_γ]

diffrax takes a second to import, and is imported only when something is integrated.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from eqm_jax.equilibrium.field import as_pytree
from eqm_jax.equilibrium.sampler import BUDGET, CONVERGED, DIVERGED, WALK, checked_start, sample_keys

FIXED = ("euler", "heun", "euler_maruyama")
ADAPTIVE = ("heun", "tsit5", "dopri5")
MAX_STEPS = 4096  # of an adaptive solver


class Solver(NamedTuple):
  """The name of diffrax's method, how often a step calls the field, and how often the start does."""

  method: str
  stages: int
  first: int = 0


SOLVERS = {
  "euler": Solver("Euler", 1),
  "euler_maruyama": Solver("Euler", 1),
  "heun": Solver("Heun", 2),
  "tsit5": Solver("Tsit5", 6, 1),  # of seven stages, the last is the next step's first
  "dopri5": Solver("Dopri5", 6, 1),
}


@flax.struct.dataclass
class Integration:
  """What `integrate` returns; all arrays in the order of x0."""

  x: jax.Array  # [B, ...]
  evaluations_B: jax.Array  # int32: calls of the field that each sample used
  status_B: jax.Array  # int32: CONVERGED (arrived), BUDGET (too many steps) or DIVERGED


def integrate(
  field_fn: Callable,
  x0: jax.Array,
  labels_B: Any,
  *,
  solver: str = "heun",
  steps: int | None = None,
  rtol: float | None = None,
  atol: float | None = None,
  timed: bool = False,
  reverse: bool = False,
  strength: float = 1.0,
  key: jax.Array | None = None,
  index_B: jax.Array | None = None,
) -> Integration:
  """Integrates the field from γ = 0 to 1, or back.

  Args:
    field_fn: (x [B, ...], labels [B]) → f [B, ...], such as `conditional_field`; with
      `timed`, (x, labels, γ [B]) → f.
    x0: where to start: noise, or images with `reverse`.
    labels_B: int [B], or any tree of arrays with leading axis B that `field_fn` takes.
    solver: with `steps`: "euler", "heun" or "euler_maruyama". With `rtol` and `atol`:
      "heun", "tsit5" or "dopri5", with step control for each sample.
    steps: how many equal steps.
    rtol, atol: relative and absolute tolerance of one step, both positive.
    timed: the field is told γ (flow matching).
    reverse: from γ = 1 to 0: encodes an image to the noise that leads to it.
    strength: s of "euler_maruyama"; 0 is "euler".
    key: for "euler_maruyama"; sample i's noise depends on (key, index_B[i]) alone.
    index_B: the indices of the samples, 0 to B−1 if not given.

  Returns:
    An `Integration`. Evaluations are steps (rejected ones too) times the solver's
    stages; a last stage that begins the next step is not counted twice.

  Raises:
    ValueError: before compilation, for arguments that do not fit each other.
  """
  x0 = checked_start(x0)
  check(solver, steps, rtol, atol, timed, reverse, strength, key)
  if {len(leaf) for leaf in jax.tree.leaves(labels_B)} - {len(x0)}:
    raise ValueError(f"labels_B must have one entry for each of the {len(x0)} samples")
  index_B = jnp.arange(len(x0)) if index_B is None else index_B
  keys_B = sample_keys(jax.random.key(0) if key is None else key, WALK, index_B)  # without a key, not used
  tolerances = None if steps else (rtol, atol)
  return _integrate(as_pytree(field_fn), x0, labels_B, keys_B, strength, tolerances, solver, steps, timed, reverse)


@functools.partial(jax.jit, static_argnames=("solver", "steps", "timed", "reverse"))
def _integrate(field_fn, x0, labels_B, keys_B, strength, tolerances, solver, steps, timed, reverse) -> Integration:
  import diffrax
  import lineax

  def velocity(time, x_B, labels_B):
    gamma = 1 - time if reverse else time
    gammas = (jnp.full(len(x_B), gamma, x_B.dtype),) if timed else ()
    f = field_fn(x_B, labels_B, *gammas).astype(x_B.dtype)
    return f if reverse else -f

  def drift(time, x_B, labels_B):
    v = velocity(time, x_B, labels_B)
    return v - strength / 2 * (x_B - time * v) if solver == "euler_maruyama" else v

  def spread(time, x_B, labels_B):
    return lineax.DiagonalLinearOperator(jnp.full_like(x_B, jnp.sqrt(strength * (1 - time))))

  def solve(x_B, labels_B, key):
    terms = diffrax.ODETerm(drift)
    if solver == "euler_maruyama":
      path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.5 / steps, jax.ShapeDtypeStruct(x_B.shape, x_B.dtype), key)
      diffusion = diffrax.ControlTerm(spread, path)
      terms = diffrax.MultiTerm(terms, diffusion)
    if steps:
      control = diffrax.StepTo(ts=jnp.linspace(0.0, 1.0, steps + 1, dtype=x_B.dtype))
    else:
      control = diffrax.PIDController(rtol=tolerances[0], atol=tolerances[1])
    return diffrax.diffeqsolve(
      terms,
      getattr(diffrax, SOLVERS[solver].method)(),
      t0=0.0,
      t1=1.0,
      dt0=None if steps else 0.01,
      y0=x_B,
      args=labels_B,
      stepsize_controller=control,
      saveat=diffrax.SaveAt(t1=True),
      max_steps=steps or MAX_STEPS,
      adjoint=diffrax.ForwardMode(),
      throw=False,
    )

  def one(x, label, key):  # a sample as a batch of one
    return solve(x[None], jax.tree.map(lambda leaf: leaf[None], label), key)

  if solver in ("euler", "heun") and steps:  # nothing ties the samples: one equation of the whole batch
    solution = solve(x0, labels_B, keys_B[0])
    x = solution.ys[0]
  else:
    solution = jax.vmap(one)(x0, labels_B, keys_B)
    x = solution.ys[:, 0, 0]
  taken_B = jnp.broadcast_to(solution.stats["num_steps"], x0.shape[:1])
  finite_B = jnp.all(jnp.isfinite(x), axis=range(1, x.ndim))
  arrived_B = jnp.broadcast_to(solution.result == diffrax.RESULTS.successful, finite_B.shape)
  status_B = jnp.where(finite_B, jnp.where(arrived_B, CONVERGED, BUDGET), DIVERGED)
  return Integration(x=x, evaluations_B=taken_B * SOLVERS[solver].stages + SOLVERS[solver].first, status_B=status_B)


def check(solver, steps=None, rtol=None, atol=None, timed=False, reverse=False, strength=1.0, key=None):
  """Refuses arguments of `integrate` that do not fit each other."""
  if solver not in SOLVERS:
    raise ValueError(f"solver {solver!r} is not known: give one of {', '.join(SOLVERS)}")
  if steps is not None:
    if rtol is not None or atol is not None:
      raise ValueError(f"steps = {steps} and tolerances {rtol}, {atol}: give one or the other")
    if solver not in FIXED:
      raise ValueError(f"solver {solver!r} controls its steps: give rtol and atol, not steps")
    if steps < 1:
      raise ValueError(f"steps = {steps} must be at least 1")
  elif solver not in ADAPTIVE:
    raise ValueError(f"solver {solver!r} takes equal steps: give their number, steps")
  elif rtol is None or atol is None or not (rtol > 0 and atol > 0):
    raise ValueError(f"rtol = {rtol} and atol = {atol} must both be positive")
  if solver == "euler_maruyama":
    if not timed or reverse:
      raise ValueError("'euler_maruyama' needs the γ of a flow-matching field (timed=True), and runs forward only")
    if key is None:
      raise ValueError("'euler_maruyama' draws random numbers: pass key=jax.random.key(...)")
    if not strength >= 0:
      raise ValueError(f"strength = {strength} must not be negative")
