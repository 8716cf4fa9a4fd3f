"""Encoding images to latent moments and decoding latents to images, in batches on this process's devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from eqm_jax import checks, distributed
from eqm_jax.checkpoints import pretrained, sd_vae
from eqm_jax.networks.autoencoder import Autoencoder


@dataclasses.dataclass(frozen=True)
class Codec:
  """An autoencoder with its weights, and the name that is recorded with its latents."""

  module: Autoencoder
  params: Any
  name: str  # "ema" or "mse" of Stable Diffusion's, or the user's own word
  batch_size: int  # images at a time on each device, which bounds the memory

  def __post_init__(self):
    checks.at_least("autoencoder.batch_size", self.batch_size, 1)

  @functools.cached_property
  def autoencoder_id(self) -> dict[str, Any]:
    """Name, SHA-256 and scaling: equal for latents of the same autoencoder."""
    return {
      "name": self.name,
      "sha256": sd_vae.fingerprint(self.module, self.params),
      "scaling_factor": self.module.scaling_factor,
    }

  def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(h, w, c) of the latents of images (H, W, C).

    Raises:
      ValueError: if the autoencoder cannot take such images.
    """
    return self._shapes("encode", image_shape)[0].shape[1:]

  def image_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(H, W, C) of the images that latents (h, w, c) decode to.

    Raises:
      ValueError: if these are no latents of the autoencoder.
    """
    return self._shapes("decode", latent_shape).shape[1:]

  def _shapes(self, method: str, shape: tuple[int, int, int]) -> Any:
    """The shapes of a method's result for one array of `shape`, without computing it."""
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(functools.partial(self.module.apply, method=method), {"params": self.params}, example)

  def moments(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] → mean and log-variance [N, 2, h, w, c], unscaled, of each image and its mirror image."""
    return self._in_batches(_moments, images)

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Latents [N, h, w, c], scaled as a model makes them → images [N, H, W, C] uint8."""
    return self._in_batches(decode_batch, latents)

  def _in_batches(self, function: Callable, array: np.ndarray) -> Any:
    return distributed.in_batches(functools.partial(function, self.module, self._replicated), array, self.batch_size)

  @functools.cached_property
  def _replicated(self) -> Any:
    return distributed.replicate(self.params)


def open_codec(options: ml_collections.ConfigDict) -> Codec | None:
  """The autoencoder of a config's section `autoencoder`; None without a path.

  Raises:
    ValueError: if it is not there, is damaged, or is not the one of `options.sha256`.
  """
  if not options.path:
    return None
  checks.one_of("autoencoder.dtype", options.dtype, ("float32", "bfloat16"))
  codec = Codec(*pretrained.load_autoencoder(options.path, dtype=options.dtype), options.name, options.batch_size)
  sha256 = codec.autoencoder_id["sha256"]
  if not options.name or options.sha256 not in (None, sha256):
    raise ValueError(
      f"{options.path} has sha256 {sha256}, but autoencoder.name = {options.name!r} and "
      f"autoencoder.sha256 = {options.sha256!r}: give a name, and this sha256 or None"
    )
  return codec


def encode_batch(module: Autoencoder, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """A batch of images in a training step → the batch of moments that a latent cache would have."""
  mean, logvar = module.apply({"params": params}, batch["image"], method="encode")
  scale = module.scaling_factor
  return {"mean": mean * scale, "logvar": logvar + 2 * np.log(scale), "label": batch["label"]}


def check_same_autoencoder(where: str, saved: dict[str, Any] | None, requested: dict[str, Any] | None):
  """Refuses to combine latents of two autoencoders; None, an unknown one, passes.

  Raises:
    ValueError: naming both.
  """
  if saved and requested and saved["sha256"] != requested["sha256"]:
    raise ValueError(
      f"{where} is of latents of the autoencoder {saved['name']!r} (sha256 {saved['sha256'][:12]}…), but "
      f"{requested['name']!r} (sha256 {requested['sha256'][:12]}…) is given: their latents differ, give the same one"
    )


@functools.partial(jax.jit, static_argnums=0)
def _moments(module: Autoencoder, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  sides = [module.apply({"params": params}, side, method="encode") for side in (images, images[:, :, ::-1])]
  mean, logvar = (jnp.stack(moment, axis=1) for moment in zip(*sides))
  return mean, logvar


@functools.partial(jax.jit, static_argnums=0)
def decode_batch(module: Autoencoder, params: Any, latents: jax.Array) -> jax.Array:
  """A batch of scaled latents [B, h, w, c] → images [B, H, W, C] uint8."""
  images = module.apply({"params": params}, latents / module.scaling_factor, method="decode")
  return jnp.rint(127.5 * jnp.clip(images, -1, 1) + 127.5).astype(jnp.uint8)
