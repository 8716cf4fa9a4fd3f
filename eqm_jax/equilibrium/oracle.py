"""The field of perfect training on a finite data set, in closed form.

    f*(x̂) = E[ c(γ)/(1−γ)·(x̂ − x) | x_γ = x̂ ]

over pairs (x_i, γ) with posterior log-weight −‖x̂ − γ·x_i‖²/(2(1−γ)²) − d·log(1−γ) + log p(γ),
d the dimension and p the density of γ. It follows from the minimiser of the EqM loss, E[(ε − x)·c(γ) | x_γ],
with ε − x = (x_γ − x)/(1−γ). No network and no training: a reference for samplers and
for the paper's statements about the landscape.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

from eqm_jax import checks
from eqm_jax.equilibrium import gamma as gamma_lib
from eqm_jax.equilibrium.gamma import GammaDensity
from eqm_jax.equilibrium.objective import Schedule, magnitude
from eqm_jax.equilibrium.pytrees import ShortRepr


@flax.struct.dataclass(eq=False, repr=False)
class OracleField(ShortRepr):
  """The optimal field of a finite data set. Made by `oracle_field`."""

  points: jax.Array
  log_s: jax.Array  # [G]: the nodes of the integral over γ, as log(1−γ)
  schedule: Schedule = flax.struct.field(pytree_node=False)
  density: GammaDensity = flax.struct.field(pytree_node=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    x_BxD, points_NxD = x.reshape(x.shape[0], -1), self.points.reshape(self.points.shape[0], -1)
    s_G = jnp.exp(self.log_s)
    offset_BxNxD = x_BxD[:, None] - points_NxD
    # ‖x̂ − γx‖² = ‖(x̂ − x) + s·x‖², divided by s² term by term so that nothing cancels as s → 0.
    square_BxN = jnp.sum(offset_BxNxD**2, axis=-1)
    cross_BxN = jnp.sum(offset_BxNxD * points_NxD, axis=-1)
    length_N = jnp.sum(points_NxD**2, axis=-1)
    exponent_BxNxG = square_BxN[..., None] / s_G**2 + 2 * cross_BxN[..., None] / s_G + length_N[:, None]
    # dγ = s·d(log s), and the nodes are equally spaced in log s: one power of s less than the density.
    log_weight_BxNxG = -exponent_BxNxG / 2 - (x_BxD.shape[1] - 1) * self.log_s
    log_weight_BxNxG += gamma_lib.log_density(1 - s_G, self.density, self.schedule)
    weight_BxNxG = jax.nn.softmax(log_weight_BxNxG, axis=(1, 2))
    stiffness_BxN = jnp.sum(weight_BxNxG * magnitude(1 - s_G, self.schedule) / s_G, axis=-1)
    return jnp.sum(stiffness_BxN[..., None] * offset_BxNxD, axis=1).reshape(x.shape)


def oracle_field(
  points: jax.Array,
  schedule: Schedule = Schedule(),
  *,
  density: GammaDensity = GammaDensity(),
  nodes: int | None = None,
  smallest: float = 1e-4,
) -> OracleField:
  """The optimal field of the data set `points`.

  The integral over γ is a sum over `nodes` values of log(1−γ), equally spaced from
  0 to log(smallest); the posterior is about 1/√(2d) wide there, wherever it sits.

  Args:
    points: the data, [N, ...].
    schedule: c(γ), λ included.
    density: of γ in training.
    nodes: the number of values of γ; None gives about five per posterior width.
    smallest: the smallest 1−γ; the field is right down to distances of about
      smallest·√d from a data point, and goes to zero below.

  Returns:
    A field, x [B, ...] → f [B, ...]. It takes memory for B·N·nodes numbers.

  Raises:
    ValueError: for fewer than two nodes, a `smallest` outside (0, 1), or a density that
      does not exist for this c(γ).
  """
  points = jnp.asarray(points)
  points = points.astype(jnp.promote_types(points.dtype, jnp.float32))
  gamma_lib.check(density, schedule)
  checks.in_interval("smallest", smallest, 0, 1, open_low=True, open_high=True)
  if nodes is not None:
    checks.at_least("nodes", nodes, 2)
  else:
    nodes = 16 + int(5 * -math.log(smallest) * math.sqrt(2 * points[0].size))
  return OracleField(points, jnp.linspace(0.0, math.log(smallest), nodes, dtype=points.dtype), schedule, density)
