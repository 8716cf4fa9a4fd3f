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
from jax.sharding import PartitionSpec

from eqm_jax import checks
from eqm_jax.equilibrium import meshes
from eqm_jax.equilibrium.field import BoundField, f_alone, with_labels
from eqm_jax.equilibrium.pytrees import Scalar, ShortRepr, as_pytree, concrete, is_traced
from eqm_jax.equilibrium.sampler import WALK, Result, Status, check_start, sample_keys

FIXED = ("euler", "heun", "euler_maruyama")
ADAPTIVE = ("heun", "tsit5", "dopri5")
MAX_STEPS = 4096  # of an adaptive solver


class Solver(NamedTuple):
  """A method of diffrax, and the NFE of its steps and of its start."""

  method: str
  stages: int  # NFE of a step
  first: int = 0  # NFE before the first step


SOLVERS = {
  "euler": Solver("Euler", 1),
  "euler_maruyama": Solver("Euler", 1),
  "heun": Solver("Heun", 2),
  "tsit5": Solver("Tsit5", 6, 1),  # of seven stages, the last is the next step's first
  "dopri5": Solver("Dopri5", 6, 1),
}


def integrate(
  field: Callable,
  x0: jax.Array,
  labels: Any = None,
  *,
  solver: str = "heun",
  steps: int | None = None,
  rtol: Scalar | None = None,
  atol: Scalar | None = None,
  time_conditional: bool = False,
  reverse: bool = False,
  strength: Scalar = 1.0,
  key: jax.Array | None = None,
  index: jax.Array | None = None,
) -> Result:
  """Integration of the field as an ODE from γ = 0 to 1, or back.

  It can be jitted, vmapped over x0, and differentiated forward (`jax.jvp`, `jax.jacfwd`), but not in reverse. Arrays
  on a mesh are treated as by `descend`; `jax.shard_map` needs check_vma=False, since diffrax does not track it.

  Args:
    field: x [B, ...] → f [B, ...]; with `labels`, (x, labels) → f; with
      `time_conditional`, γ [B] comes last: (x, labels, γ) → f.
    x0: where to start: noise, or images with `reverse`.
    labels: int [B], or any tree of arrays with leading axis B that `field` takes; None for a field that has its
      labels bound by `eqm_jax.field`. Solvers with step control evaluate each sample alone, so a function of your own
      must take what differs between samples as labels.
    solver: with `steps`: "euler", "heun" or "euler_maruyama". With `rtol` and `atol`:
      "heun", "tsit5" or "dopri5", with step control for each sample.
    steps: the number of equal steps.
    rtol, atol: relative and absolute tolerance of one step, both positive.
    time_conditional: the field takes γ (flow matching).
    reverse: from γ = 1 to 0: encodes an image to the noise that leads to it.
    strength: s of "euler_maruyama"; 0 is "euler".
    key: for "euler_maruyama"; sample i's noise depends on (key, index[i]) alone.
    index: the indices of the samples; None: 0 to B−1.

  Returns:
    A `Result` with norm NaN and no restarts. Its NFE is steps (rejected ones too) times the solver's
    stages; a last stage that begins the next step is not counted twice.

  Raises:
    ValueError: before compilation, for arguments that do not fit each other.
  """
  x0 = check_start(x0)
  check(solver, steps, rtol, atol, time_conditional=time_conditional, reverse=reverse, strength=strength, key=key)
  field, labels = _split_labels(field, labels)
  sizes = {len(leaf) for leaf in jax.tree.leaves(labels)}
  if sizes - {len(x0)}:
    raise ValueError(f"labels have leading sizes {sorted(sizes)}: give one for each of the {len(x0)} samples")
  index_B = jnp.arange(len(x0)) if index is None else jnp.asarray(index)
  keys_B = sample_keys(jax.random.key(0) if key is None else key, WALK, index_B)  # without a key, not used
  equation = _Equation(solver, steps, time_conditional, reverse)
  arguments = (field, (x0, labels, keys_B), strength, None if steps else (rtol, atol))
  axes = meshes.spec_of(x0)
  batch = PartitionSpec(*axes[:1])
  run = functools.partial(_integrate, equation=equation)
  return meshes.call(run, arguments, like=x0, out_specs=Result(axes, batch, batch, batch, batch))


def _split_labels(field: Callable, labels: Any) -> tuple[Callable, Any]:
  """A pytree (x, labels[, γ]) → f, and labels; () for a field without any."""
  f_alone(field)  # for its check
  if labels is not None:
    with_labels(field, labels)  # for its checks
    return as_pytree(field), labels
  if isinstance(field, BoundField):
    return field.field, field.labels
  return _Unlabelled(with_labels(field)), ()


@flax.struct.dataclass(eq=False, repr=False)
class _Unlabelled(ShortRepr):
  """A field x → f as one that takes labels and ignores them."""

  field: Callable

  def __call__(self, x: jax.Array, labels: Any, *gamma: jax.Array) -> jax.Array:
    return self.field(x, *gamma)


class _Equation(NamedTuple):
  """The static part of an integration: it is compiled in."""

  solver: str
  steps: int | None
  time_conditional: bool
  reverse: bool


@functools.partial(jax.jit, static_argnames="equation")
def _integrate(field, samples, strength, tolerances, equation: _Equation) -> Result:
  import diffrax

  x0, labels_B, keys_B = samples
  solver, steps = equation.solver, equation.steps
  control = None if steps else diffrax.PIDController(rtol=tolerances[0], atol=tolerances[1])

  def solve(x_B, labels_B, key):
    return diffrax.diffeqsolve(
      _terms(field, strength, equation, x_B, key),
      getattr(diffrax, SOLVERS[solver].method)(),
      t0=0.0,
      t1=1.0,
      dt0=None if steps else 0.01,
      y0=x_B,
      args=labels_B,
      stepsize_controller=control or diffrax.StepTo(ts=jnp.linspace(0.0, 1.0, steps + 1, dtype=x_B.dtype)),
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
  status_B = jnp.where(finite_B, jnp.where(arrived_B, Status.CONVERGED, Status.BUDGET), Status.DIVERGED)
  nfe_B = taken_B * SOLVERS[solver].stages + SOLVERS[solver].first
  unknown_B = jnp.full(len(x), jnp.nan, jnp.float32)  # a solver asks for no gradient where it ends
  return Result(x, nfe_B, unknown_B, status_B, restarts=jnp.zeros_like(nfe_B))


def _terms(field, strength, equation: _Equation, example: jax.Array, key: jax.Array):
  """The equation in diffrax's form; `example` is a batch of samples."""
  import diffrax
  import lineax

  def velocity(time, x_B, labels_B):
    gamma = 1 - time if equation.reverse else time
    gammas = (jnp.full(len(x_B), gamma, x_B.dtype),) if equation.time_conditional else ()
    f = field(x_B, labels_B, *gammas)
    if f.shape != x_B.shape:
      raise ValueError(f"the field returned shape {f.shape} for samples of shape {x_B.shape}: it must be the same")
    f = f.astype(x_B.dtype)
    return f if equation.reverse else -f

  if equation.solver != "euler_maruyama":
    return diffrax.ODETerm(velocity)

  def drift(time, x_B, labels_B):
    v = velocity(time, x_B, labels_B)
    return v - strength / 2 * (x_B - time * v)

  def spread(time, x_B, labels_B):
    return lineax.DiagonalLinearOperator(jnp.full_like(x_B, jnp.sqrt(strength * (1 - time))))

  shape = jax.ShapeDtypeStruct(example.shape, example.dtype)
  brownian = diffrax.VirtualBrownianTree(0.0, 1.0, 0.5 / equation.steps, shape, key)
  return diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(spread, brownian))


def check(
  solver: str,
  steps: int | None = None,
  rtol: Scalar | None = None,
  atol: Scalar | None = None,
  *,
  time_conditional: bool = False,
  reverse: bool = False,
  strength: Scalar = 1.0,
  key: jax.Array | None = None,
):
  """Refuses arguments of `integrate` that do not fit each other."""
  if solver not in SOLVERS:
    raise ValueError(f"solver {solver!r} is not known: give one of {', '.join(SOLVERS)}")
  if steps is not None:
    if rtol is not None or atol is not None:
      raise ValueError(f"steps = {steps} and tolerances {rtol}, {atol}: give one or the other")
    if solver not in FIXED:
      raise ValueError(f"solver {solver!r} controls its steps: give rtol and atol, not steps")
    checks.at_least("steps", steps, 1)
  elif solver not in ADAPTIVE:
    raise ValueError(f"solver {solver!r} takes equal steps: give their number, steps")
  elif rtol is None or atol is None or not (is_traced(rtol, atol) or (concrete(rtol) > 0 and concrete(atol) > 0)):
    raise ValueError(f"rtol = {rtol} and atol = {atol} must both be positive: give steps for equal steps instead")
  if solver == "euler_maruyama":
    if not time_conditional or reverse:
      raise ValueError(
        "solver 'euler_maruyama' needs the γ of a flow-matching field (time_conditional=True), and runs forward only: "
        "use 'euler' or 'heun'"
      )
    if key is None:
      raise ValueError("solver 'euler_maruyama' draws random numbers: pass key=jax.random.key(...)")
    checks.at_least("strength", concrete(strength), 0)
