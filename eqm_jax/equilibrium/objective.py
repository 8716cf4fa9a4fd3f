"""The training objective of Equilibrium Matching (arXiv 2510.02300, section 3).

    x_γ = γ·x + (1−γ)·ε          γ ~ U(0, 1): 0 is noise, 1 is data (gamma.py has other densities)
    L   = ‖f(x_γ) − (ε − x)·c(γ)‖²

The network f never sees γ. It points uphill, from data to noise, so sampling
descends it. c(1) = 0 makes every data point stationary.

Losses are per sample, the mean over that sample's elements; the caller takes
the batch mean.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eqm_jax import checks

KINDS = ("constant", "linear", "truncated", "piecewise", "self_stopping", "power")


@jax.tree_util.register_static  # it may be an argument of jitted functions
@dataclasses.dataclass(frozen=True)
class Schedule:
  """Magnitude c(γ) of the target gradient, times the multiplier λ.

  constant       c = λ                                     (flow matching's end point)
  linear         c = λ·(1−γ)
  truncated      c = λ for γ ≤ a, else λ·(1−γ)/(1−a)       (the paper's best, a = 0.8)
  piecewise      c = λ·(b − (b−1)·γ/a) for γ ≤ a, else λ·(1−γ)/(1−a)
  self_stopping  c = λ·2/(1+t) for γ ≤ 2t/(1+t), else λ·2·√((1−γ)/(1−t²)), t the breakpoint
                 (Beckmann Transport Models, arXiv 2608.01692)
  power          c = λ·(1−γ)^p, p the exponent

  The defaults are the released ones: c(γ) = 4·min(1, 5·(1−γ)).

  Attributes:
    kind: one of these.
    a: in [0, 1), and above 0 for "piecewise".
    b: positive.
    multiplier: λ, positive.
    breakpoint: in [0, 1): the time at which the path of "self_stopping" begins to slow down.
    exponent: positive.

  Raises:
    ValueError: for an unknown kind, or an attribute outside its range.
  """

  kind: str = "truncated"
  a: float = 0.8
  b: float = 2.0
  multiplier: float = 4.0
  breakpoint: float = 0.9
  exponent: float = 0.8

  def __post_init__(self):
    checks.one_of("schedule.kind", self.kind, KINDS)
    is_piecewise = self.kind == "piecewise"
    checks.in_interval("schedule.a", self.a, 0, 1, open_low=is_piecewise, open_high=True, remedy="the paper's is 0.8")
    for name, remedy in (("b", "it is c(0)/λ"), ("multiplier", "the paper's is 4"), ("exponent", "1 is 'linear'")):
      ends = dict(open_low=True, open_high=True)
      checks.in_interval(f"schedule.{name}", getattr(self, name), 0, math.inf, **ends, remedy=remedy)
    checks.in_interval("schedule.breakpoint", self.breakpoint, 0, 1, open_high=True, remedy="0.9 is in use")

  @property
  def fall(self) -> float:
    """γ from which c falls to zero; a for the kinds that fall from the start, or never."""
    return 2 * self.breakpoint / (1 + self.breakpoint) if self.kind == "self_stopping" else self.a

  @property
  def pieces(self) -> tuple["Piece", ...]:
    """c(γ)/λ as powers of linear functions, from γ = 0 to 1."""
    whole, tail = (0.0, 1.0), Piece(self.fall, 1.0, 1.0, 0.0)
    if self.kind == "constant":
      pieces = (Piece(*whole, 1.0, 1.0),)
    elif self.kind in ("linear", "power"):
      pieces = (Piece(*whole, 1.0, 0.0, self.exponent if self.kind == "power" else 1.0),)
    elif self.kind == "self_stopping":
      first = 2 / (1 + self.breakpoint)
      pieces = (Piece(0.0, self.fall, first, first), Piece(self.fall, 1.0, first**2, 0.0, 0.5))
    else:
      pieces = (Piece(0.0, self.a, self.b if self.kind == "piecewise" else 1.0, 1.0), tail)
    return tuple(piece for piece in pieces if piece.high > piece.low)

  def inverse_integral(self, gamma: float) -> float:
    """∫ λ/c from 0 to γ < 1: what λ·η·NFE is when the ideal trajectory, dγ = η·c(γ) a step, arrives there."""
    return sum(piece.until(min(gamma, piece.high)).integral(-1) for piece in self.pieces if piece.low < gamma)


class Piece(NamedTuple):
  """A part of c(γ)/λ: v^power, v linear in γ from v(low) = first to v(high) = last."""

  low: float
  high: float
  first: float
  last: float
  power: float = 1.0

  @property
  def slope(self) -> float:
    """dv/dγ."""
    return (self.last - self.first) / (self.high - self.low)

  def until(self, gamma: float) -> "Piece":
    """The part below γ, which is inside."""
    return self._replace(high=gamma, last=self.first + (gamma - self.low) * self.slope)

  def since(self, gamma: float) -> "Piece":
    """The part above γ, which is inside."""
    return self._replace(low=gamma, first=self.first + (gamma - self.low) * self.slope)

  def integral(self, power: float) -> float:
    """∫ (c/λ)^power dγ over the piece; infinite where it diverges."""
    exponent = self.power * power + 1
    if self.first == self.last:
      return (self.high - self.low) * self.first ** (exponent - 1)
    if self.last == 0 and exponent <= 0:
      return math.inf
    log_ratio = math.log(self.last / self.first) if self.last else -math.inf
    # (last^q − first^q)/q, which tends to the logarithm as q → 0.
    mean = self.first**exponent * math.expm1(exponent * log_ratio) / exponent if exponent else log_ratio
    return mean / self.slope


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
  elif s.kind == "self_stopping":
    t = s.breakpoint
    c = 2 * jnp.minimum(1 / (1 + t), jnp.sqrt(jnp.maximum(1 - gamma, 0) / (1 - t**2)))
  elif s.kind == "power":
    c = jnp.maximum(1 - gamma, 0) ** s.exponent
  else:
    c = jnp.where(gamma <= s.a, s.b - (s.b - 1) * gamma / s.a, tail)
  return s.multiplier * c


def schedule_of(options: Any) -> Schedule:
  """c(γ) of a config's section `objective`; that of flow matching is c ≡ 1."""
  if options.kind == "equilibrium":
    return Schedule(**options.schedule)
  return Schedule("constant", multiplier=1.0)


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
