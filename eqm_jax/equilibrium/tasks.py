"""Applications of a landscape besides images from noise: denoising, scoring, inpainting and editing.

A time-free field is valid at every noise level at once, so each task is a descent, or
one evaluation of the field, from some other start. Composition is `field.compose`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax import checks
from eqm_jax.equilibrium import sampler
from eqm_jax.equilibrium.field import f_alone
from eqm_jax.equilibrium.objective import Schedule, corrupt, magnitude, per_sample
from eqm_jax.equilibrium.pytrees import FieldFn, Scalar, ShortRepr, is_traced

# Folded into a key where no sample index reaches: for another try, and for fresh noise.
RETRY, SETTLE = 2**32 - 3, 2**32 - 4
NEAREST = 1e-3  # a known pixel's pace is that of this 1−γ when it is nearer


def noised(image: jax.Array, gamma: Scalar, key: jax.Array, index: jax.Array | None = None) -> jax.Array:
  """Images mixed with noise, x_γ = γ·x + (1−γ)·ε: the start of partial denoising and editing.

  Args:
    image: [B, ...].
    gamma: one number or one per sample [B], in [0, 1]: 0 is noise, 1 the image.
    key: sample i's noise depends on (key, index[i]) alone.
    index: the indices of the samples; None: 0 to B−1.

  Raises:
    ValueError: for a γ outside [0, 1], or of another shape.
  """
  image = sampler.check_start(image)
  index_B = jnp.arange(len(image)) if index is None else index
  noise = sampler.start_noise(key, index_B, image.shape[1:], image.dtype)
  return corrupt(image, noise, check_gamma(gamma, len(image)))


def check_gamma(gamma: Scalar, count: int) -> jax.Array:
  """γ of each of `count` samples, float32.

  Raises:
    ValueError: for a γ outside [0, 1], or of another shape.
  """
  if np.shape(gamma) not in ((), (count,)):
    raise ValueError(f"gamma has shape {np.shape(gamma)}: give one number, or one for each of {count} images")
  if not is_traced(gamma) and not np.all((np.asarray(gamma) >= 0) & (np.asarray(gamma) <= 1)):
    raise ValueError(f"gamma = {gamma} must be in [0, 1]: 0 is noise, 1 the image")
  return jnp.broadcast_to(jnp.asarray(gamma, jnp.float32), (count,))


@jax.jit
def field_norm(field: FieldFn, x: jax.Array) -> jax.Array:
  """‖f(x)‖₂ of each sample, [B]: small in the valleys, where the data is, and so a score of outliers.

  Args:
    field: a field that is a pytree.
    x: [B, ...], without noise.
  """
  f = field(x)
  return jnp.sqrt(jnp.sum(f**2, axis=range(1, f.ndim)))


@flax.struct.dataclass(eq=False, repr=False)
class MaskedField(ShortRepr):
  """A field outside the known pixels, and on these the direction to their values. Made by `inpaint`."""

  field: Callable
  image: jax.Array
  unknown: jax.Array  # 1 where `field` acts, 0 where `image` is known
  noise_norm: jax.Array  # ‖ε − image‖ over the known pixels, at γ = 0
  schedule: Schedule = flax.struct.field(pytree_node=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    offset = (x - self.image) * (1 - self.unknown)
    # On the ideal trajectory x − image = (1−γ)·(ε − image): the known pixels themselves show how far they are.
    distance_B = jnp.sqrt(jnp.sum(offset**2, axis=range(1, x.ndim))) / self.noise_norm
    nearness_B = jnp.clip(distance_B, NEAREST, 1.0)
    pace_B = magnitude(1 - nearness_B, self.schedule) / nearness_B
    return self.unknown * self.field(x) + per_sample(pace_B, x) * offset


def inpaint(
  field: FieldFn,
  image: jax.Array,
  mask: jax.Array,
  key: jax.Array,
  *,
  schedule: Schedule = Schedule(),
  gamma: Scalar = 0.0,
  settle: int = 50,
  tries: int = 1,
  index: jax.Array | None = None,
  **descent: Any,
) -> sampler.Result:
  """Painting of the masked pixels, to fit the others; with another class, editing of an image.

  First, for `settle` evaluations of the field, the level rises from `gamma` to where the schedule falls. At each,
  the picture so far is mixed with fresh noise; the field there gives the next
  picture, x̂ = x − (1−γ)/c(γ)·f(x), whose known pixels are put right. Fresh noise
  keeps the painted pixels from settling on what one noise happened to suggest.

  Then a descent. The known pixels descend a landscape whose one valley is the image, at
  the pace c(γ)/(1−γ)·(x − image) at which the field brings in the others: all pixels have
  one noise level throughout, though the network has no input for it.

  Where the painted pixels fit badly, f without the mask still pulls at the known ones. So
  of several `tries` the one with the smallest ‖f‖ of the whole image is kept.

  Args:
    field: x [B, ...] → f [B, ...].
    image: [B, ...]; what lies under the mask matters only for γ above 0.
    mask: true or 1 where to paint; of a shape that broadcasts to that of `image`.
    key: of all noise, as for `noised`, and of the random numbers of `descend`.
    schedule: c(γ) that the field was trained with, λ included.
    gamma: where to start; 0 keeps nothing of what is under the mask.
    settle: NFE before the descent; 0 descends at once.
    tries: how often each image is painted, from other noise.
    index: the indices of the samples; None: 0 to B−1.
    **descent: arguments of `descend`: step_size, max_nfe, threshold, rule, ...

  Returns:
    A `Result`, its known pixels exactly those of `image`. Its norm is ‖f‖ of the whole
    image; its NFE is that of all tries; the record, if any, is that of
    the last descent.

  Raises:
    ValueError: for a mask of another shape or with values besides 0 and 1, a γ
      outside [0, 1], settle below 0, fewer than one try, and as `descend`.
  """
  checks.at_least("tries", tries, 1)
  checks.at_least("settle", settle, 0)
  image = sampler.check_start(image)
  unknown = check_mask(mask, image.shape).astype(image.dtype)
  images = (image, unknown, check_gamma(gamma, len(image)))
  index_B = jnp.arange(len(image)) if index is None else index
  field, best = f_alone(field), None
  for number in range(tries):
    try_key = jax.random.fold_in(jax.random.fold_in(key, jnp.uint32(RETRY)), number) if number else key
    start, noise = _settle(field, images, try_key, index_B, schedule=schedule, settle=settle)
    known_norm_B = jnp.sqrt(jnp.sum(((noise - image) * (1 - unknown)) ** 2, axis=range(1, image.ndim)))
    masked = MaskedField(field, image, unknown, jnp.maximum(known_norm_B, NEAREST), schedule)
    result = sampler.descend(masked, start, key=try_key, index=index_B, **descent)
    x = jnp.where(unknown > 0, result.x, image)
    result = result.replace(x=x, norm=field_norm(field, x), nfe=result.nfe + settle + 1)
    best = result if best is None else _better(best, result)
  return best


@functools.partial(jax.jit, static_argnames=("schedule", "settle"))
def _settle(field, images, key, index_B, *, schedule: Schedule, settle: int):
  """Where the descent starts, and the noise that is in it."""
  image, unknown, gamma_B = images
  last_B = jnp.maximum(gamma_B, schedule.fall) if settle else gamma_B

  def noise_at(k):
    step_key = jax.random.fold_in(jax.random.fold_in(key, jnp.uint32(SETTLE)), k)
    return sampler.start_noise(step_key, index_B, image.shape[1:], image.dtype)

  def step(guess, k):
    level_B = gamma_B + (last_B - gamma_B) * k / settle
    x = corrupt(guess, noise_at(k), level_B)
    # x_γ − x = (1−γ)·(ε − x), and f is trained to be (ε − x)·c(γ).
    pace_B = (1 - level_B) / jnp.maximum(magnitude(level_B, schedule), NEAREST)
    guess = x - per_sample(pace_B, x) * field(x)
    return jnp.where(unknown > 0, guess, image), None

  guess = jax.lax.scan(step, image, jnp.arange(settle))[0] if settle else image
  noise = noise_at(settle)
  return corrupt(guess, noise, last_B), noise


def _better(best: sampler.Result, result: sampler.Result) -> sampler.Result:
  """Sample by sample the one with the smaller ‖f‖, and the NFE of both."""
  better_B = (result.norm < best.norm) | ~jnp.isfinite(best.norm)
  chosen = sampler.where(better_B, result.replace(record=None), best.replace(record=None))
  return chosen.replace(nfe=best.nfe + result.nfe, record=result.record)


def check_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The mask in the shape of the images.

  Raises:
    ValueError: if it does not broadcast to `shape`, or holds more than 0 and 1.
  """
  mask = mask if is_traced(mask) else np.asarray(mask)
  if not is_traced(mask) and not np.all((mask == 0) | (mask == 1)):
    raise ValueError(f"mask has values from {mask.min()} to {mask.max()}: give 1 (paint anew) and 0 (keep) only")
  try:
    return jnp.broadcast_to(mask, shape)
  except ValueError as error:
    raise ValueError(f"mask has shape {mask.shape}, which does not broadcast to images of shape {shape}") from error
