"""The autoencoder at work: images to moments and latents to images, batch by batch on this host's devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax import devices
from eqm_jax.convert import autoencoder as convert
from eqm_jax.networks.autoencoder import Autoencoder


@dataclasses.dataclass(frozen=True)
class Codec:
  """An autoencoder with its weights and the name that is recorded wherever its latents go."""

  module: Autoencoder
  params: Any
  name: str  # "ema" or "mse" of Stable Diffusion's, or the user's own word
  batch_size: int  # images at a time on each device; what a large image needs is bounded by it

  def __post_init__(self):
    if self.batch_size < 1:
      raise ValueError(f"autoencoder.batch_size = {self.batch_size} must be at least 1")

  @functools.cached_property
  def identity(self) -> dict[str, Any]:
    """What tells latents of one autoencoder from those of another."""
    return {
      "name": self.name,
      "sha256": convert.fingerprint(self.module, self.params),
      "scaling_factor": self.module.scaling_factor,
    }

  def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(h, w, c) of the latents of images (H, W, C).

    Raises:
      ValueError: if it cannot take such images.
    """
    return self._shapes("encode", image_shape)[0].shape[1:]

  def image_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(H, W, C) of the images that latents (h, w, c) decode to.

    Raises:
      ValueError: if they are none of its latents.
    """
    return self._shapes("decode", latent_shape).shape[1:]

  def _shapes(self, method: str, shape: tuple[int, int, int]) -> Any:
    """What a method answers to one array of `shape`, without computing it."""
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(functools.partial(self.module.apply, method=method), {"params": self.params}, example)

  def moments(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] → mean and log-variance [N, 2, h, w, c], unscaled.

    The second side is the mirror image's.
    """
    return self._in_batches(_moments, images)

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Latents [N, h, w, c], scaled as a model makes them → images [N, H, W, C] uint8."""
    return self._in_batches(decode_batch, latents)

  def _in_batches(self, function: Callable, array: np.ndarray) -> Any:
    return devices.in_batches(functools.partial(function, self.module, self._placed), array, self.batch_size)

  @functools.cached_property
  def _placed(self) -> Any:
    return devices.replicate(self.params)


def encode_batch(module: Autoencoder, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """A batch of images in a training step, all at once → the batch of moments that a cache would have given."""
  mean, logvar = module.apply({"params": params}, batch["image"], method="encode")
  scale = module.scaling_factor
  return {"mean": mean * scale, "logvar": logvar + 2 * np.log(scale), "label": batch["label"]}


def check_same_autoencoder(where: str, there: dict[str, Any] | None, here: dict[str, Any] | None):
  """Refuses to bring together latents of two autoencoders; None is one that nobody knows.

  Raises:
    ValueError: naming both.
  """
  if there and here and there["sha256"] != here["sha256"]:
    raise ValueError(
      f"{where} is of latents of the autoencoder {there['name']!r} (sha256 {there['sha256'][:12]}…), "
      f"but {here['name']!r} (sha256 {here['sha256'][:12]}…) is given: their latents differ"
    )


@functools.partial(jax.jit, static_argnums=0)
def _moments(module: Autoencoder, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  sides = [module.apply({"params": params}, side, method="encode") for side in (images, images[:, :, ::-1])]
  mean, logvar = (jnp.stack(moment, axis=1) for moment in zip(*sides))
  return mean, logvar


@functools.partial(jax.jit, static_argnums=0)
def decode_batch(module: Autoencoder, params: Any, latents: jax.Array) -> jax.Array:
  """A batch of scaled latents [B, h, w, c] → images [B, H, W, C] uint8, all at once."""
  images = module.apply({"params": params}, latents / module.scaling_factor, method="decode")
  return jnp.rint(127.5 * jnp.clip(images, -1, 1) + 127.5).astype(jnp.uint8)
