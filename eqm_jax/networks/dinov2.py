"""DINOv2, the vision transformer whose class token is compared for FD-DINOv2 (Oquab et al. 2023; Stein et al. 2023).

Modules and parameters have the published names, so that a file of weights is read name by name
(checkpoints/dinov2.py). Every product is in full float32, as Inception's.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax import checks
from eqm_jax.networks import resize as resize_lib
from eqm_jax.networks.resize import EXACT

SIZE = 224  # height and width of the images that the network sees: 16 patches of 14 pixels
HEAD_WIDTH = 64  # of all published sizes
RESIZES = ("bicubic", "tf1")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
OFFSET = 0.1  # of the published interpolation of positions: a side of n tokens is scaled as one of n + 0.1
SIZES = {(384, 12): "ViT-S", (768, 12): "ViT-B", (1024, 24): "ViT-L", (1536, 40): "ViT-g"}  # by width and depth


class DINOv2(nn.Module):
  """The network: images [B, 224, 224, 3], normalised → the class token after the last norm, [B, width].

  The defaults are those of ViT-L/14, which FD-DINOv2 is computed with.

  Raises:
    ValueError: when built, if the heads do not divide the width, or the patches not the images.
  """

  width: int = 1024
  depth: int = 24
  num_heads: int = 16
  patch_size: int = 14  # pixels of a side
  grid: int = 37  # tokens of a side that `pos_embed` has: images of 518 pixels
  mlp_width: int = 4096  # hidden numbers of the MLP
  registers: int = 0  # tokens without a patch or a position
  swiglu: bool = False  # gated MLP, of ViT-g
  layer_scale: bool = True

  def __post_init__(self):
    for name in ("width", "depth", "num_heads", "patch_size", "grid", "mlp_width"):
      checks.at_least(f"DINOv2.{name}", getattr(self, name), 1)
    if self.width % self.num_heads:
      raise ValueError(
        f"DINOv2.num_heads = {self.num_heads} does not divide the width {self.width}: published sizes have heads of "
        f"{HEAD_WIDTH} numbers"
      )
    if SIZE % self.patch_size:
      raise ValueError(
        f"DINOv2.patch_size = {self.patch_size} must divide the {SIZE} pixels of a side: 14 is published"
      )
    super().__post_init__()

  @property
  def title(self) -> str:
    """The size as it is published, "ViT-L/14"; others by their attributes."""
    name = SIZES.get((self.width, self.depth), f"ViT of width {self.width} and depth {self.depth}")
    return f"{name}/{self.patch_size}" + (f" with {self.registers} registers" if self.registers else "")

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    batch, patch, side = len(x_BxHxWxC), (self.patch_size,) * 2, SIZE // self.patch_size
    zeros = nn.initializers.zeros
    cls_token = self.param("cls_token", zeros, (1, 1, self.width))
    pos_embed = self.param("pos_embed", zeros, (1, 1 + self.grid**2, self.width))
    x_BxTxD = PatchEmbed(self.width, patch, name="patch_embed")(x_BxHxWxC)
    positions_TxD = _resize_positions(pos_embed[0, 1:], self.grid, side, antialias=self.registers > 0)
    class_BxTxD = jnp.broadcast_to(cls_token + pos_embed[:, :1], (batch, 1, self.width))
    tokens = [class_BxTxD, x_BxTxD + positions_TxD]
    if self.registers:
      register_tokens = self.param("register_tokens", zeros, (1, self.registers, self.width))
      tokens.insert(1, jnp.broadcast_to(register_tokens, (batch, self.registers, self.width)))
    x_BxTxD = jnp.concatenate(tokens, axis=1)
    for i in range(self.depth):
      x_BxTxD = Block(self.num_heads, self.mlp_width, self.swiglu, self.layer_scale, name=f"blocks_{i}")(x_BxTxD)
    return _norm("norm")(x_BxTxD[:, 0])


class PatchEmbed(nn.Module):
  """Patches as tokens, [B, (H/patch)·(W/patch), width]."""

  width: int
  patch: tuple[int, int]

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    x = nn.Conv(self.width, self.patch, self.patch, "VALID", precision=EXACT, name="proj")(x_BxHxWxC)
    return x.reshape(len(x), -1, self.width)


class Block(nn.Module):
  """Attention and MLP, each after a norm and scaled by channel, both added to the tokens [B, T, D]."""

  num_heads: int
  mlp_width: int
  swiglu: bool
  layer_scale: bool

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    mlp = SwiGLU if self.swiglu else MLP
    attention_BxTxD = Attention(self.num_heads, name="attn")(_norm("norm1")(x_BxTxD))
    x_BxTxD = x_BxTxD + (LayerScale(name="ls1")(attention_BxTxD) if self.layer_scale else attention_BxTxD)
    mlp_BxTxD = mlp(self.mlp_width, name="mlp")(_norm("norm2")(x_BxTxD))
    return x_BxTxD + (LayerScale(name="ls2")(mlp_BxTxD) if self.layer_scale else mlp_BxTxD)


class Attention(nn.Module):
  """Self-attention of all tokens."""

  num_heads: int

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    batch, tokens, width = x_BxTxD.shape
    qkv = _dense(3 * width, "qkv")(x_BxTxD).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=EXACT) / math.sqrt(query.shape[-1])
    x = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value, precision=EXACT)
    return _dense(width, "proj")(x.reshape(batch, tokens, width))


class MLP(nn.Module):
  """Two layers with an exact GELU between."""

  hidden: int

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    x = nn.gelu(_dense(self.hidden, "fc1")(x_BxTxD), approximate=False)
    return _dense(x_BxTxD.shape[-1], "fc2")(x)


class SwiGLU(nn.Module):
  """The gated MLP of ViT-g: one layer makes gate and value."""

  hidden: int

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    gate, value = jnp.split(_dense(2 * self.hidden, "w12")(x_BxTxD), 2, axis=-1)
    return _dense(x_BxTxD.shape[-1], "w3")(nn.silu(gate) * value)


class LayerScale(nn.Module):
  """A factor for each channel."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return x * self.param("gamma", nn.initializers.ones, x.shape[-1:])


def features(module: DINOv2, params: Any, images_uint8: jax.Array, resize: str = "bicubic") -> jax.Array:
  """Class tokens of images after the last norm, in float32.

  The network is compiled once for a batch size, for images of any size. It can be called inside jax.jit, and with
  images sharded along the batch, if the parameters are replicated.

  Args:
    module, params: as `checkpoints.dinov2.load` returns them; jax.device_put the parameters first if there are many
      batches.
    images_uint8: [B, H, W, 3] in 0..255, RGB, of any height and width from one patch (14 pixels) on.
    resize: to 224×224. "bicubic": antialiased, as PIL does it, in float and clipped to 0..255. "tf1": bilinear without
      antialiasing, as in TensorFlow 1.

  Returns:
    [B, width].

  Raises:
    ValueError: if the images are of another shape or type, or `resize` is unknown.
  """
  checks.one_of("resize", resize, RESIZES)
  resize_lib.check_images("DINOv2", images_uint8, module.patch_size)
  return _network(module, params, _prepare(images_uint8, resize))


def parameter_shapes(module: DINOv2) -> Any:
  """The tree of parameters as jax.ShapeDtypeStruct."""
  return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))["params"]


@functools.partial(jax.jit, static_argnames="module")
def _network(module: DINOv2, params: Any, x_BxHxWxC: jax.Array) -> jax.Array:
  return module.apply({"params": params}, x_BxHxWxC)


@functools.partial(jax.jit, static_argnames="resize")
def _prepare(images_BxHxWxC: jax.Array, resize: str) -> jax.Array:
  """Images 0..255 of any size → [B, 224, 224, C], normalised as ImageNet's."""
  mean, deviation = (np.asarray(values, np.float32) for values in (MEAN, DEVIATION))
  return (resize_lib.resized(images_BxHxWxC, SIZE, resize) / 255 - mean) / deviation


def _resize_positions(positions_TxD: jax.Array, grid: int, side: int, *, antialias: bool) -> jax.Array:
  """Positions of grid² tokens → those of side², as published: with registers antialiased, else with an offset."""
  if grid == side:
    return positions_TxD
  if antialias:
    matrix = resize_lib.antialiased_cubic(grid, side)
  else:
    matrix = resize_lib.sampled_cubic(grid, side, grid / (side + OFFSET))
  square = positions_TxD.reshape(grid, grid, -1)
  square = jnp.einsum("ih,hwd->iwd", matrix, square, precision=EXACT)
  return jnp.einsum("jw,iwd->ijd", matrix, square, precision=EXACT).reshape(side * side, -1)


def _norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


def _dense(width: int, name: str) -> nn.Dense:
  return nn.Dense(width, precision=EXACT, name=name)
