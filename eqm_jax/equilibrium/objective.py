"""The training objective of Equilibrium Matching (arXiv 2510.02300, section 3).

    x_γ = γ·x + (1−γ)·ε          γ ~ U(0, 1): 0 is noise, 1 is data
    L   = ‖f(x_γ) − (ε − x)·c(γ)‖²

The network f never sees γ. It points uphill, from data to noise, so sampling
descends it. c(1) = 0 makes every data point stationary.

Losses are per sample, the mean over that sample's elements; the caller takes
the batch mean.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("constant", "linear", "truncated", "piecewise")


@jax.tree_util.register_static  # it may be an argument of jitted functions
@dataclasses.dataclass(frozen=True)
class Schedule:
  """Magnitude c(γ) of the target gradient, times the multiplier λ.

  constant   c = λ                                     (flow matching's end point)
  linear     c = λ·(1−γ)
  truncated  c = λ for γ ≤ a, else λ·(1−γ)/(1−a)       (the paper's best, a = 0.8)
  piecewise  c = λ·(b − (b−1)·γ/a) for γ ≤ a, else λ·(1−γ)/(1−a)

  The defaults are the released ones: c(γ) = 4·min(1, 5·(1−γ)).

  Raises:
    ValueError: for an unknown kind, a outside [0, 1) or a λ that is not positive.
  """

  kind: str = "truncated"
  a: float = 0.8
  b: float = 2.0
  multiplier: float = 4.0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"schedule: kind = {self.kind!r} is not known: choose one of {', '.join(KINDS)}")
    if not 0 <= self.a < 1 or (self.kind == "piecewise" and self.a == 0):
      raise ValueError(f"schedule: a = {self.a} must be in [0, 1), and above 0 for 'piecewise'; the paper's is 0.8")
    if not self.multiplier > 0:
      raise ValueError(f"schedule: multiplier = {self.multiplier} must be positive; the paper's is 4")


def magnitude(gamma: jax.Array, schedule: Schedule = Schedule()) -> jax.Array:
  """c(γ), the length of the target gradient relative to ε − x. Shape as `gamma`."""
  s = schedule
  tail = (1 - gamma) / (1 - s.a)
  if s.kind == "constant":
    c = jnp.ones_like(gamma)
  elif s.kind == "linear":
    c = 1 - gamma
  elif s.kind == "truncated":
    c = jnp.minimum(1, tail)
  else:
    c = jnp.where(gamma <= s.a, s.b - (s.b - 1) * gamma / s.a, tail)
  return s.multiplier * c


def mean_square_magnitude(schedule: Schedule) -> float:
  """E[c(γ)²] over γ ~ U(0, 1), in closed form; 13.867 for the released schedule.

  The loss of a network with output zero is E[c²]·(1 + Var(data)), so a loss
  divided by this number can be compared across schedules.
  """
  s = schedule
  tail = (1 - s.a) / 3
  mean_square = {
    "constant": 1.0,
    "linear": 1 / 3,
    "truncated": s.a + tail,
    "piecewise": s.a * (s.b**2 + s.b + 1) / 3 + tail,
  }[s.kind]
  return s.multiplier**2 * mean_square


def corrupt(data: jax.Array, noise: jax.Array, gamma: jax.Array) -> jax.Array:
  """Data mixed with noise: x_γ = γ·x + (1−γ)·ε.

  Args:
    data, noise: arrays of one shape [B, ...].
    gamma: [B], or any shape that broadcasts from the left.
  """
  gamma = per_sample(gamma, data)
  return gamma * data + (1 - gamma) * noise


def target_gradient(data: jax.Array, noise: jax.Array, gamma: jax.Array, schedule: Schedule) -> jax.Array:
  """Gradient that f is trained to equal at x_γ: (ε − x)·c(γ)."""
  return (noise - data) * per_sample(magnitude(gamma, schedule), data)


def equilibrium_loss(
  field: Callable,
  data: jax.Array,
  noise: jax.Array,
  gamma: jax.Array,
  schedule: Schedule,
  *,
  has_aux: bool = False,
) -> jax.Array | tuple[jax.Array, Any]:
  """The EqM loss ‖f(x_γ) − (ε − x)·c(γ)‖², averaged over each sample's elements.

  Args:
    field: x [B, ...] → f [B, ...].
    data, noise: [B, ...]; data standardised to about unit variance.
    gamma: [B], in [0, 1].
    schedule: c(γ).
    has_aux: as in `jax.grad`: `field` returns (f, aux), and this (loss, aux).

  Returns:
    The loss of each sample, [B].
  """
  output = field(corrupt(data, noise, gamma))
  return _residual_loss(output, target_gradient(data, noise, gamma, schedule), has_aux)


def flow_matching_loss(
  field: Callable, data: jax.Array, noise: jax.Array, gamma: jax.Array, *, time_conditional: bool, has_aux: bool = False
) -> jax.Array | tuple[jax.Array, Any]:
  """Loss of the flow-matching baseline in EqM's sign: ‖f(x_γ, γ) − (ε − x)‖², f = −velocity.

  Args:
    field: (x, γ) → f when `time_conditional`, else x → f: "unconditional flow matching",
      which is EqM with c ≡ 1.
    data, noise, gamma, has_aux: as for `equilibrium_loss`.
    time_conditional: whether the field takes γ.

  Returns:
    The loss of each sample, [B].
  """
  x_gamma = corrupt(data, noise, gamma)
  output = field(x_gamma, gamma) if time_conditional else field(x_gamma)
  return _residual_loss(output, noise - data, has_aux)


def dispersive_loss(tokens: jax.Array) -> jax.Array:
  """Dispersive loss, log mean exp(−‖z_i − z_j‖²/D) over all pairs, the diagonal included: a scalar.

  Pushes the activations of different samples apart (Wang & He 2025); the
  released code adds it with weight 0.5, the reported results do not use it.

  Args:
    tokens: activations [B, ...]; D is the number of elements of one sample. The
      pairs are those of the batch given here.
  """
  B = tokens.shape[0]
  z_BxD = tokens.reshape(B, -1).astype(jnp.promote_types(tokens.dtype, jnp.float32))
  # Centred, ‖z_i‖² + ‖z_j‖² − 2·z_i·z_j loses nothing that matters, and needs no B×B×D array.
  z_BxD -= jnp.mean(z_BxD, axis=0)
  gram_BxB = jnp.matmul(z_BxD, z_BxD.T, precision=jax.lax.Precision.HIGHEST) / z_BxD.shape[1]
  length_B = jnp.diagonal(gram_BxB)
  square_BxB = jnp.maximum(length_B[:, None] + length_B[None] - 2 * gram_BxB, 0)
  return jax.scipy.special.logsumexp(-square_BxB) - 2 * jnp.log(B)


def per_sample(value: jax.Array, like: jax.Array) -> jax.Array:
  """Appends axes to `value` until it broadcasts against `like` from the left."""
  value = jnp.asarray(value)
  return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def _residual_loss(output, target: jax.Array, has_aux: bool):
  f, *aux = output if has_aux else (output,)
  loss_B = jnp.mean((f - target) ** 2, axis=range(1, target.ndim))
  return (loss_B, *aux) if has_aux else loss_B
