"""What a landscape is for besides images from noise: denoising, scoring, inpainting and editing.

A time-free field is valid at every noise level at once, so each task is a descent, or
one look at the field, from some other start. Composition is `field.compose`.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax.equilibrium import sampler
from eqm_jax.equilibrium.field import as_pytree
from eqm_jax.equilibrium.objective import Schedule, corrupt, magnitude, per_sample

NEAREST = 1e-3  # a known pixel's pace is that of this 1−γ when it is nearer


def noised(image: jax.Array, gamma: float | jax.Array, key: jax.Array, index_B: jax.Array | None = None) -> jax.Array:
  """x_γ = γ·x + (1−γ)·ε: where a descent for partial denoising or editing starts.

  Args:
    image: [B, ...].
    gamma: one number or one per sample [B], in [0, 1]: 0 is noise, 1 the image.
    key: sample i's noise depends on (key, index_B[i]) alone.
    index_B: the indices of the samples, 0 to B−1 if not given.

  Raises:
    ValueError: for a γ outside [0, 1], or of another shape.
  """
  image = sampler.checked_start(image)
  if np.shape(gamma) not in ((), image.shape[:1]):
    raise ValueError(f"gamma has shape {np.shape(gamma)}: give one number, or one for each of {len(image)} images")
  if not np.all((np.asarray(gamma) >= 0) & (np.asarray(gamma) <= 1)):
    raise ValueError(f"gamma = {gamma} must lie in [0, 1]: 0 is noise, 1 the image")
  index_B = jnp.arange(len(image)) if index_B is None else index_B
  noise = sampler.start_noise(key, index_B, image.shape[1:], image.dtype)
  return corrupt(image, noise, jnp.broadcast_to(jnp.asarray(gamma, image.dtype), image.shape[:1]))


@jax.jit
def field_norm(field_fn: Callable, x: jax.Array) -> jax.Array:
  """‖f(x)‖₂ of each sample, [B]: small in the valleys, where the data is, so it scores what is no data.

  Args:
    field_fn: a field that is a pytree.
    x: [B, ...], clean as far as anyone knows.
  """
  f = field_fn(x)
  return jnp.sqrt(jnp.sum(f**2, axis=range(1, f.ndim)))


@flax.struct.dataclass
class MaskedField:
  """A field outside the known pixels, and on these the way to their values. Made by `inpaint`."""

  field_fn: Callable
  image: jax.Array
  unknown: jax.Array  # 1 where `field_fn` acts, 0 where `image` is known
  noise_norm_B: jax.Array  # ‖ε − image‖ over the known pixels, at γ = 0
  schedule: Schedule = flax.struct.field(pytree_node=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    offset = (x - self.image) * (1 - self.unknown)
    # On the way x − image = (1−γ)·(ε − image), so the known pixels themselves tell how far they are.
    distance_B = jnp.sqrt(jnp.sum(offset**2, axis=range(1, x.ndim))) / self.noise_norm_B
    nearness_B = jnp.clip(distance_B, NEAREST, 1.0)
    pace_B = magnitude(1 - nearness_B, self.schedule) / nearness_B
    return self.unknown * self.field_fn(x) + per_sample(pace_B, x) * offset


def inpaint(
  field_fn: Callable,
  image: jax.Array,
  mask: jax.Array,
  key: jax.Array,
  *,
  schedule: Schedule = Schedule(),
  gamma: float | jax.Array = 0.0,
  index_B: jax.Array | None = None,
  **descent: Any,
) -> sampler.Result:
  """Paints the masked pixels anew, by descent, to fit the others.

  The known pixels start as noisy as the unknown ones and descend a landscape whose one
  valley is the image, at the pace c(γ)/(1−γ)·(x − image) at which the field brings in
  the unknown ones: so the network sees one noise level all along, of which nobody tells
  it. With another class in the field, and a start γ above 0, this edits an image.

  Args:
    field_fn: x [B, ...] → f [B, ...].
    image: [B, ...]; what lies under the mask matters only for γ above 0.
    mask: true or 1 where to paint; of a shape that broadcasts to that of `image`.
    key: of the start noise, as for `noised`.
    schedule: c(γ) that the field was trained with, λ included.
    gamma: where to start; 0 keeps nothing of what is under the mask.
    index_B: the indices of the samples, 0 to B−1 if not given.
    **descent: arguments of `descend`: step_size, max_evaluations, threshold, rule, ...

  Returns:
    A `Result`, its known pixels exactly those of `image`.

  Raises:
    ValueError: for a mask of another shape or with values besides 0 and 1, a γ
      outside [0, 1], and as `descend`.
  """
  image = sampler.checked_start(image)
  unknown = checked_mask(mask, image.shape).astype(image.dtype)
  start, noise = (noised(image, level, key, index_B) for level in (gamma, 0.0))
  known_norm_B = jnp.sqrt(jnp.sum(((noise - image) * (1 - unknown)) ** 2, axis=range(1, image.ndim)))
  masked = MaskedField(as_pytree(field_fn), image, unknown, jnp.maximum(known_norm_B, NEAREST), schedule)
  result = sampler.descend(masked, start, index_B=index_B, **descent)
  return result.replace(x=jnp.where(unknown > 0, result.x, image))


def checked_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The mask in the shape of the images.

  Raises:
    ValueError: if it does not broadcast to `shape`, or holds more than 0 and 1.
  """
  mask = np.asarray(mask)
  if not np.all((mask == 0) | (mask == 1)):
    raise ValueError(f"mask has values from {mask.min()} to {mask.max()}: give 1 (paint anew) and 0 (keep) only")
  try:
    return jnp.broadcast_to(mask, shape)
  except ValueError as error:
    raise ValueError(f"mask has shape {mask.shape}, which does not fit images of shape {shape}") from error
