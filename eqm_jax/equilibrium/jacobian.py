"""How far a field is from being the gradient of an energy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from eqm_jax.equilibrium.field import as_pytree

PROBES = 2**32 - 5  # folded into the key of random probes, where no sample index reaches


def asymmetry(field_fn: Callable, x: jax.Array, key: jax.Array, probes: int = 16) -> jax.Array:
  """How far a field is from being a gradient: ‖J − Jᵀ‖/‖J‖ at each x, [B].

  J is the Jacobian ∂f/∂x of one sample, the norms are Frobenius'. Estimated with random
  v ~ N(0, I), E‖Av‖² = ‖A‖². 0 for the gradient of any energy, √2 for a J of
  independent random entries, 2 for a rotation.

  Args:
    field_fn: x [B, ...] → f [B, ...], each sample on its own; one with forward derivatives,
      which cuDNN's attention has not.
    x: where, [B, ...].
    key: of the probes.
    probes: how many; the relative error is about 1/√(probes·dimension).
  """
  return _asymmetry(as_pytree(field_fn), x, key, probes)


@functools.partial(jax.jit, static_argnames="probes")
def _asymmetry(field_fn, x, key, probes):
  _, transposed = jax.vjp(field_fn, x)
  axes = range(1, x.ndim)

  def squares(key):
    v = jax.random.normal(key, x.shape, x.dtype)
    forward, backward = jax.jvp(field_fn, (x,), (v,))[1], transposed(v)[0]
    return jnp.sum((forward - backward) ** 2, axis=axes), jnp.sum(forward**2, axis=axes)

  difference_PxB, whole_PxB = jax.lax.map(
    squares, jax.random.split(jax.random.fold_in(key, jnp.uint32(PROBES)), probes)
  )
  whole_B = whole_PxB.mean(axis=0)
  return jnp.sqrt(difference_PxB.mean(axis=0) / jnp.where(whole_B == 0, 1, whole_B))  # of a field at rest: 0
