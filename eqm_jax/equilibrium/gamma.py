"""The density that γ has in training, and what follows from it.

The paper draws γ ~ U(0, 1). With c(γ) the pair (x_γ, target) is then the drift of no
interpolant between noise and data, unless c is constant: x_γ(t) moves with the velocity
−(ε − x)·c if dγ/dt = c(γ), and its γ, at a time t that is uniform, has a density ∝ 1/c.
With this density, called consistent here, the optimal field of a finite data set has the
direction of the one for c ≡ 1 everywhere, and transports noise to data as that one does
(Beckmann Transport Models, arXiv 2608.01692).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax import checks
from eqm_jax.equilibrium.objective import Piece, Schedule, magnitude

KINDS = ("uniform", "logit_normal", "consistent")
ROUNDING = 2.0**-24  # 1 − γ that float32 does not tell from 0
LARGEST_SHARE_AT_DATA = 0.1  # of γ that are 1 to rounding
# Of the quadrature over logit(γ), in deviations from its mean, and for each of them; beyond lies 1e-23 of the mass.
REACH, NODES = 10.0, 32


@jax.tree_util.register_static  # it may be an argument of jitted functions
@dataclasses.dataclass(frozen=True)
class GammaDensity:
  """Density of γ in training.

  uniform       γ ~ U(0, 1)                                  (the paper's)
  logit_normal  log(γ/(1−γ)) ~ N(mean, deviation²)           (Esser et al., arXiv 2403.03206)
  consistent    density ∝ 1/max(c(γ)/λ, floor)

  1/c can be normalised where c falls to zero more slowly than 1−γ: "self_stopping",
  "power" with an exponent below 1, "constant". There no floor is needed, but for an
  exponent above 0.86, where a tenth of γ is 1 to rounding. Elsewhere the floor must be
  positive: from the γ on where c/λ is below it, γ is uniform.

  Attributes:
    kind: one of these.
    mean, deviation: of logit(γ), for "logit_normal"; the deviation is positive.
    floor: of c/λ, for "consistent", in [0, 1); 0 is none.

  Raises:
    ValueError: for an unknown kind, or an attribute outside its range.
  """

  kind: str = "uniform"
  mean: float = 0.0
  deviation: float = 1.0
  floor: float = 0.0

  def __post_init__(self):
    checks.one_of("gamma.kind", self.kind, KINDS)
    unbounded = dict(open_low=True, open_high=True)
    checks.in_interval("gamma.mean", self.mean, -math.inf, math.inf, **unbounded, remedy="0 puts the median at 0.5")
    checks.in_interval("gamma.deviation", self.deviation, 0, math.inf, **unbounded, remedy="1 is usual")
    checks.in_interval("gamma.floor", self.floor, 0, 1, open_high=True, remedy="0 is none; 0.05 is small")


def check(density: GammaDensity, schedule: Schedule):
  """Refuses a density that does not exist for this c(γ).

  Raises:
    ValueError: for "consistent" without a floor where 1/c cannot be normalised, or puts a tenth of γ at 1.
  """
  if density.kind == "consistent":
    _segments(density.floor, schedule)


def quantile(u: jax.Array, density: GammaDensity, schedule: Schedule = Schedule()) -> jax.Array:
  """γ of the cumulative probability `u`, in closed form: samples of the density from uniform numbers.

  Args:
    u: in [0, 1), of any shape.
    density, schedule: of the objective; c(γ) matters for "consistent" alone.

  Raises:
    ValueError: as `check`.
  """
  if density.kind == "uniform":
    return u
  if density.kind == "logit_normal":
    return jax.nn.sigmoid(density.mean + density.deviation * jax.scipy.special.ndtri(u))
  segments = _segments(density.floor, schedule)
  mass = u * sum(segment.mass for segment in segments)
  gamma, before = jnp.zeros_like(u), 0.0
  for segment in segments:
    gamma = jnp.where(mass >= before, segment.after(jnp.clip(mass - before, 0, segment.mass)), gamma)
    before += segment.mass
  return gamma


def log_density(gamma: jax.Array, density: GammaDensity, schedule: Schedule = Schedule()) -> jax.Array:
  """Logarithm of the density of γ, normalised over (0, 1). Shape as `gamma`.

  Raises:
    ValueError: as `check`.
  """
  if density.kind == "uniform":
    return jnp.zeros_like(gamma)
  if density.kind == "logit_normal":
    is_inside = (gamma > 0) & (gamma < 1)
    inside = jnp.where(is_inside, gamma, 0.5)
    z = (jnp.log(inside) - jnp.log1p(-inside) - density.mean) / density.deviation
    log_slope = -jnp.log(inside) - jnp.log1p(-inside) - math.log(density.deviation * math.sqrt(2 * math.pi))
    return jnp.where(is_inside, log_slope - z**2 / 2, -jnp.inf)
  total = sum(segment.mass for segment in _segments(density.floor, schedule))
  return -jnp.log(jnp.maximum(magnitude(gamma, schedule) / schedule.multiplier, density.floor)) - math.log(total)


def mean_square_magnitude(schedule: Schedule, density: GammaDensity = GammaDensity()) -> float:
  """E[c(γ)²] over the density of γ; 13.867 for the released c(γ) and uniform γ.

  The loss of a network with output zero is E[c²]·(1 + Var(data)), so a loss
  divided by this number can be compared across schedules and densities.

  In closed form for "uniform" and "consistent". There is none for "logit_normal", except for
  a constant c: it is computed by Gauss-Legendre quadrature, to rounding for deviations up to 10.

  Raises:
    ValueError: as `check`.
  """
  if density.kind == "uniform":
    mean_square = sum(piece.integral(2) for piece in schedule.pieces)
  elif density.kind == "logit_normal":
    mean_square = sum(_logit_normal_mean_square(piece, density) for piece in schedule.pieces)
  else:
    segments = _segments(density.floor, schedule)
    mean_square = sum(segment.square for segment in segments) / sum(segment.mass for segment in segments)
  return schedule.multiplier**2 * mean_square


@dataclasses.dataclass(frozen=True)
class _Segment:
  """A piece of c/λ on one side of the floor, with the integrals of 1/max(c/λ, floor), alone and times (c/λ)²."""

  piece: Piece
  floor: float  # if c/λ lies below it on the piece, else 0

  @property
  def mass(self) -> float:
    return (self.piece.high - self.piece.low) / self.floor if self.floor else self.piece.integral(-1)

  def mass_above(self, gamma: float) -> float:
    """The part of the mass above γ."""
    if gamma <= self.piece.low:
      return self.mass
    return dataclasses.replace(self, piece=self.piece.since(gamma)).mass if gamma < self.piece.high else 0.0

  @property
  def square(self) -> float:
    return self.piece.integral(2) / self.floor if self.floor else self.piece.integral(1)

  def after(self, mass: jax.Array) -> jax.Array:
    """γ up to which the segment has this mass."""
    piece, exponent = self.piece, 1 - self.piece.power
    if self.floor:
      return piece.low + mass * self.floor
    if piece.first == piece.last:
      return piece.low + mass * piece.first**piece.power
    # v^q = first^q + q·slope·mass, q the exponent; written so that q → 0 is its limit, the exponential.
    growth = piece.slope * mass * piece.first**-exponent
    log_ratio = jnp.log1p(jnp.maximum(exponent * growth, -1)) / exponent if exponent else growth
    return jnp.minimum(piece.low + piece.first * jnp.expm1(log_ratio) / piece.slope, piece.high)


@functools.lru_cache(maxsize=64)
def _segments(floor: float, schedule: Schedule) -> tuple[_Segment, ...]:
  """The pieces of c/λ, split where it crosses the floor."""
  segments = []
  for piece in schedule.pieces:
    level = floor ** (1 / piece.power)  # of v where c/λ is the floor
    ends = (piece.first < level, piece.last < level)
    if ends[0] == ends[1]:
      segments.append(_Segment(piece, floor if ends[0] else 0.0))
    else:
      crossing = piece.low + (level - piece.first) / piece.slope
      for part, is_below in zip((piece.until(crossing), piece.since(crossing)), ends):
        segments.append(_Segment(part, floor if is_below else 0.0))
  mass = sum(segment.mass for segment in segments)
  if not math.isfinite(mass):
    if floor > 0:
      raise ValueError(f"gamma.floor = {floor} is too small: c/λ falls to it at γ = 1 to rounding. 0.05 is usual")
    raise ValueError(
      f"gamma.floor = {floor} must be in (0, 1) where gamma.kind = 'consistent' and c falls to zero like that of "
      f"schedule.kind = {schedule.kind!r}, for 1/c cannot be normalised: set a floor such as 0.05, or choose "
      "'self_stopping', or 'power' with an exponent below 1"
    )
  share = sum(segment.mass_above(1 - ROUNDING) for segment in segments) / mass
  if share > LARGEST_SHARE_AT_DATA:
    raise ValueError(
      f"schedule.kind = {schedule.kind!r} with gamma.kind = 'consistent' and gamma.floor = {floor} puts {share:.0%} of "
      "γ at 1 to rounding, where the target is zero: set a gamma.floor such as 0.05, or for 'power' a smaller exponent"
    )
  return tuple(segments)


def _logit_normal_mean_square(piece: Piece, density: GammaDensity) -> float:
  """The piece's part of E[(c/λ)²], by quadrature over the standard normal z of logit(γ) = mean + deviation·z."""
  with np.errstate(divide="ignore"):
    ends = np.log([piece.low, piece.high]) - np.log1p([-piece.low, -piece.high])
  low, high = np.clip((ends - density.mean) / density.deviation, -REACH, REACH)
  edges = np.unique(np.clip(np.arange(-REACH, REACH + 1), low, high))
  nodes, weights = np.polynomial.legendre.leggauss(NODES)
  half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
  z = middle + half * nodes
  gamma = 1 / (1 + np.exp(-(density.mean + density.deviation * z)))
  v = np.maximum(piece.first + (gamma - piece.low) * piece.slope, 0)
  return float(np.sum(half * weights * v ** (2 * piece.power) * np.exp(-(z**2) / 2)) / math.sqrt(2 * math.pi))
