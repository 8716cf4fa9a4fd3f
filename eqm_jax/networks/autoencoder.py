"""Stable Diffusion's autoencoder (AutoencoderKL): images to a Gaussian over latents, and back.

Modules have the names of the published weights, so that conversion is a renaming; the attributes are those of the
published config.json.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Autoencoder(nn.Module):
  """Encoder to mean and log-variance of a diagonal Gaussian, and decoder; each level but the last halves the image.

  Methods, by `module.apply({"params": params}, array, method="encode")`:
    encode: image [B, H, W, C] in [−1, 1] → mean, logvar [B, H/r, W/r, Z], r = `reduction`.
    decode: latent [B, H/r, W/r, Z] → image [B, H, W, C], about in [−1, 1].

  Latents are unscaled; models are trained on `scaling_factor` times those, which have about unit variance. Results are
  float32, whatever `dtype` the convolutions have.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # one for each level
  layers_per_block: int = 2
  norm_num_groups: int = 32
  mid_block_add_attention: bool = True
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  scaling_factor: float = 0.18215
  dtype: str = "float32"  # or "bfloat16"

  @property
  def reduction(self) -> int:
    """Pixels per latent pixel, along each side."""
    return 2 ** (len(self.block_out_channels) - 1)

  def setup(self):
    shared = dict(groups=self.norm_num_groups, attention=self.mid_block_add_attention, dtype=self.dtype)
    Z = self.latent_channels
    self.encoder = Encoder(self.block_out_channels, self.layers_per_block, 2 * Z, **shared)
    self.decoder = Decoder(self.block_out_channels, self.layers_per_block, self.out_channels, **shared)
    self.quant_conv = _conv(2 * Z, 1, self.dtype) if self.use_quant_conv else _identity
    self.post_quant_conv = _conv(Z, 1, self.dtype) if self.use_post_quant_conv else _identity

  def encode(self, image_BxHxWxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, H, W, C = image_BxHxWxC.shape
    if C != self.in_channels or H % self.reduction or W % self.reduction:
      raise ValueError(
        f"the autoencoder takes images [B, H, W, {self.in_channels}], H and W multiples of {self.reduction}, "
        f"but got {image_BxHxWxC.shape}: crop or resize them"
      )
    moments = self.quant_conv(self.encoder(image_BxHxWxC)).astype(_result_type(self.dtype))
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30, 20)

  def decode(self, latent_BxHxWxZ: jax.Array) -> jax.Array:
    if latent_BxHxWxZ.shape[-1] != self.latent_channels:
      raise ValueError(f"the autoencoder has {self.latent_channels} latent channels, but got {latent_BxHxWxZ.shape}")
    return self.decoder(self.post_quant_conv(latent_BxHxWxZ)).astype(_result_type(self.dtype))

  def __call__(self, image_BxHxWxC: jax.Array) -> jax.Array:
    """The reconstruction of an image: the decoded mean of its posterior."""
    return self.decode(self.encode(image_BxHxWxC)[0])


class Encoder(nn.Module):
  """Images → moments [B, H/r, W/r, 2·Z], by levels of residual layers."""

  channels: tuple[int, ...]
  layers: int
  out: int
  groups: int
  attention: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = _conv(self.channels[0], 3, self.dtype, name="conv_in")(x)
    for level, channels in enumerate(self.channels):
      last = level == len(self.channels) - 1
      x = Down(channels, self.layers, not last, self.groups, self.dtype, name=f"down_blocks_{level}")(x)
    x = Middle(self.attention, self.groups, self.dtype, name="mid_block")(x)
    x = nn.silu(_norm(self.groups, self.dtype, name="conv_norm_out")(x))
    return _conv(self.out, 3, self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
  """Latents → images, by levels of residual layers."""

  channels: tuple[int, ...]
  layers: int
  out: int
  groups: int
  attention: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = _conv(self.channels[-1], 3, self.dtype, name="conv_in")(x)
    x = Middle(self.attention, self.groups, self.dtype, name="mid_block")(x)
    for level, channels in enumerate(reversed(self.channels)):
      last = level == len(self.channels) - 1
      x = Up(channels, self.layers + 1, not last, self.groups, self.dtype, name=f"up_blocks_{level}")(x)
    x = nn.silu(_norm(self.groups, self.dtype, name="conv_norm_out")(x))
    return _conv(self.out, 3, self.dtype, name="conv_out")(x)


class Down(nn.Module):
  """Residual layers, then half the size."""

  channels: int
  layers: int
  halve: bool
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in range(self.layers):
      x = Residual(self.channels, self.groups, self.dtype, name=f"resnets_{layer}")(x)
    return Downsample(self.dtype, name="downsamplers_0")(x) if self.halve else x


class Up(nn.Module):
  """Residual layers, then double the size."""

  channels: int
  layers: int
  double: bool
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in range(self.layers):
      x = Residual(self.channels, self.groups, self.dtype, name=f"resnets_{layer}")(x)
    return Upsample(self.dtype, name="upsamplers_0")(x) if self.double else x


class Middle(nn.Module):
  """Residual layers with attention between them, at the coarsest level."""

  attention: bool
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Residual(x.shape[-1], self.groups, self.dtype, name="resnets_0")(x)
    if self.attention:
      x = Attention(self.groups, self.dtype, name="attentions_0")(x)
    return Residual(x.shape[-1], self.groups, self.dtype, name="resnets_1")(x)


class Residual(nn.Module):
  """Two convolutions, each after a group norm and an activation, added to the input."""

  channels: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = nn.silu(_norm(self.groups, self.dtype, name="norm1")(x))
    h = _conv(self.channels, 3, self.dtype, name="conv1")(h)
    h = nn.silu(_norm(self.groups, self.dtype, name="norm2")(h))
    h = _conv(self.channels, 3, self.dtype, name="conv2")(h)
    if x.shape[-1] != self.channels:
      x = _conv(self.channels, 1, self.dtype, name="conv_shortcut")(x)
    return x + h


class Attention(nn.Module):
  """Attention with one head over all positions of the image."""

  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x_BxHxWxD: jax.Array) -> jax.Array:
    B, H, W, D = x_BxHxWxD.shape
    tokens_BxTxD = _norm(self.groups, self.dtype, name="group_norm")(x_BxHxWxD).reshape(B, H * W, D)
    q, k, v = (nn.Dense(D, dtype=self.dtype, name=name)(tokens_BxTxD) for name in ("to_q", "to_k", "to_v"))
    weights_BxTxT = jax.nn.softmax((jnp.einsum("btd,bsd->bts", q, k) / D**0.5).astype(_result_type(self.dtype)))
    mixed_BxTxD = jnp.einsum("bts,bsd->btd", weights_BxTxT.astype(v.dtype), v)
    out_BxTxD = nn.Dense(D, dtype=self.dtype, name="to_out_0")(mixed_BxTxD)
    return x_BxHxWxD + out_BxTxD.reshape(B, H, W, D)


class Downsample(nn.Module):
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    # One pixel of zeros below and to the right, none above and to the left, as in the published code.
    return _conv(x.shape[-1], 3, self.dtype, strides=2, padding=((0, 1), (0, 1)), name="conv")(x)


class Upsample(nn.Module):
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return _conv(x.shape[-1], 3, self.dtype, name="conv")(x)


def posterior_sample(mean: jax.Array, logvar: jax.Array, noise: jax.Array) -> jax.Array:
  """A sample of N(mean, exp(logvar)) by standard normal `noise`."""
  return mean + jnp.exp(logvar / 2) * noise


def attributes(module: Autoencoder) -> dict[str, Any]:
  """The attributes of a module: Autoencoder(**attributes(module)) == module."""
  fields = [field.name for field in dataclasses.fields(Autoencoder) if field.name not in ("parent", "name")]
  return {name: getattr(module, name) for name in fields}


def parameter_shapes(module: Autoencoder) -> Any:
  """The tree of parameters as jax.ShapeDtypeStruct."""
  size = module.reduction
  example = jax.ShapeDtypeStruct((1, size, size, module.in_channels), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), example)["params"]


def _conv(features: int, size: int, dtype: str, *, strides: int = 1, padding="SAME", name: str | None = None):
  return nn.Conv(features, (size, size), strides, padding, dtype=dtype, name=name)


def _norm(groups: int, dtype: str, *, name: str) -> nn.GroupNorm:
  return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, name=name)


def _identity(x: jax.Array) -> jax.Array:
  return x


def _result_type(dtype: str) -> jnp.dtype:
  return jnp.promote_types(dtype, jnp.float32)
