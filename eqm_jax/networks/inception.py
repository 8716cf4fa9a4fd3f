"""The Inception-v3 whose features define the FID: images to pool, spatial and logits.

The TensorFlow graph of 2015-12-05, as in pytorch-fid, torch-fidelity and ADM's evaluator. Unlike torchvision's, its
average pools do not count the padding, the last block's pool takes the maximum, and there are 1008 classes.

Batch norms are folded into the convolutions when the weights are converted (checkpoints/inception.py). Modules have the
published names. Every product is in full float32: distances between features would show the bfloat16 of a TPU's or the
TF32 of a GPU's default.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax import checks
from eqm_jax.networks.resize import EXACT, check_images, resized

SIZE = 299  # height and width of the network's input
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of Mixed_6d, as in ADM's evaluator: 17·17·7 = 2023 numbers, about as many as pool's
RESIZES = ("tf1", "half_pixel")


def features(params: Any, images_uint8: jax.Array, resize: str = "tf1") -> dict[str, jax.Array]:
  """Features of images, in float32.

  The network is compiled once for a batch size, for images of any size. It can be called inside jax.jit, and with
  images sharded along the batch, if the parameters are replicated.

  Args:
    params: as `checkpoints.inception.load` returns them; jax.device_put them first if there are many batches.
    images_uint8: [B, H, W, 3] in 0..255, RGB, of any height and width.
    resize: to 299×299, without antialiasing. "tf1": as in TensorFlow 1 (pixel i is read at i·H/299), then
      (x − 128)/128: that of the original FID, ADM's evaluator and torch-fidelity. "half_pixel": between pixel centres,
      then 2x/255 − 1: that of pytorch-fid.

  Returns:
    pool [B, 2048], after the last average: for FID, KID, precision and recall.
    spatial [B, 17, 17, 7], the first channels of Mixed_6d, those of its 1×1 branch: for ADM's sFID.
    logits_unbiased [B, 1008], the last layer without its bias: for the Inception Score.

  Raises:
    ValueError: if the images are of another shape or type, or `resize` is unknown.
  """
  checks.one_of("resize", resize, RESIZES)
  check_images("Inception", images_uint8)
  return _network(params, _prepare(images_uint8, resize))


def parameter_shapes() -> Any:
  """The tree of parameters as jax.ShapeDtypeStruct: a kernel and a bias for each convolution, a kernel for fc."""
  example = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  return jax.eval_shape(Inception().init, jax.random.key(0), example)["params"]


@jax.jit
def _network(params: Any, x_BxHxWxC: jax.Array) -> dict[str, jax.Array]:
  return Inception().apply({"params": params}, x_BxHxWxC)


@functools.partial(jax.jit, static_argnames="resize")
def _prepare(images_BxHxWxC: jax.Array, resize: str) -> jax.Array:
  """Images 0..255 of any size → [B, 299, 299, C] in about [−1, 1]."""
  x = resized(images_BxHxWxC, SIZE, resize)
  return (x - 128) / 128 if resize == "tf1" else x * (2 / 255) - 1


class Inception(nn.Module):
  """The network: images [B, 299, 299, 3] in about [−1, 1] → the dict of `features`."""

  @nn.compact
  def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
    x = Conv(32, 3, 2, "VALID", name="Conv2d_1a_3x3")(x)
    x = Conv(32, 3, 1, "VALID", name="Conv2d_2a_3x3")(x)
    x = Conv(64, 3, name="Conv2d_2b_3x3")(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    x = Conv(80, 1, name="Conv2d_3b_1x1")(x)
    x = Conv(192, 3, 1, "VALID", name="Conv2d_4a_3x3")(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    x = BlockA(32, name="Mixed_5b")(x)
    x = BlockA(64, name="Mixed_5c")(x)
    x = BlockA(64, name="Mixed_5d")(x)
    x = BlockB(name="Mixed_6a")(x)
    x = BlockC(128, name="Mixed_6b")(x)
    x = BlockC(160, name="Mixed_6c")(x)
    x = BlockC(160, name="Mixed_6d")(x)
    spatial = x[..., :SPATIAL_CHANNELS]
    x = BlockC(192, name="Mixed_6e")(x)
    x = BlockD(name="Mixed_7a")(x)
    x = BlockE(_average, name="Mixed_7b")(x)
    x = BlockE(_largest, name="Mixed_7c")(x)
    pool = x.mean((1, 2))
    logits = nn.Dense(CLASSES, use_bias=False, precision=EXACT, name="fc")(pool)
    return {"pool": pool, "spatial": spatial, "logits_unbiased": logits}


class Conv(nn.Module):
  """A convolution, with the batch norm after it folded in, and relu."""

  channels: int
  size: int | tuple[int, int]
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    strides = (self.stride, self.stride)
    size = self.size if isinstance(self.size, tuple) else (self.size, self.size)
    kernel = self.param("kernel", nn.initializers.he_normal(), (*size, x.shape[-1], self.channels))
    bias = self.param("bias", nn.initializers.zeros, (self.channels,))
    order = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, kernel, strides, self.padding, dimension_numbers=order, precision=EXACT)
    return nn.relu(x + bias)


class BlockA(nn.Module):
  """Branches at 35×35: 1×1, 5×5, twice 3×3, and a pool."""

  pool_channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    one = Conv(64, 1, name="branch1x1")(x)
    five = Conv(48, 1, name="branch5x5_1")(x)
    five = Conv(64, 5, name="branch5x5_2")(five)
    three = Conv(64, 1, name="branch3x3dbl_1")(x)
    three = Conv(96, 3, name="branch3x3dbl_2")(three)
    three = Conv(96, 3, name="branch3x3dbl_3")(three)
    pool = Conv(self.pool_channels, 1, name="branch_pool")(_average(x))
    return _join(one, five, three, pool)


class BlockB(nn.Module):
  """Branches from 35×35 to 17×17."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    single = Conv(384, 3, 2, "VALID", name="branch3x3")(x)
    double = Conv(64, 1, name="branch3x3dbl_1")(x)
    double = Conv(96, 3, name="branch3x3dbl_2")(double)
    double = Conv(96, 3, 2, "VALID", name="branch3x3dbl_3")(double)
    return _join(single, double, nn.max_pool(x, (3, 3), (2, 2)))


class BlockC(nn.Module):
  """Branches at 17×17: 1×1, 7×7 as 1×7 and 7×1 once and twice, and a pool."""

  inner: int  # channels between 1×7 and 7×1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    one = Conv(192, 1, name="branch1x1")(x)
    single = Conv(self.inner, 1, name="branch7x7_1")(x)
    single = Conv(self.inner, (1, 7), name="branch7x7_2")(single)
    single = Conv(192, (7, 1), name="branch7x7_3")(single)
    double = Conv(self.inner, 1, name="branch7x7dbl_1")(x)
    double = Conv(self.inner, (7, 1), name="branch7x7dbl_2")(double)
    double = Conv(self.inner, (1, 7), name="branch7x7dbl_3")(double)
    double = Conv(self.inner, (7, 1), name="branch7x7dbl_4")(double)
    double = Conv(192, (1, 7), name="branch7x7dbl_5")(double)
    return _join(one, single, double, Conv(192, 1, name="branch_pool")(_average(x)))


class BlockD(nn.Module):
  """Branches from 17×17 to 8×8."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    three = Conv(192, 1, name="branch3x3_1")(x)
    three = Conv(320, 3, 2, "VALID", name="branch3x3_2")(three)
    seven = Conv(192, 1, name="branch7x7x3_1")(x)
    seven = Conv(192, (1, 7), name="branch7x7x3_2")(seven)
    seven = Conv(192, (7, 1), name="branch7x7x3_3")(seven)
    seven = Conv(192, 3, 2, "VALID", name="branch7x7x3_4")(seven)
    return _join(three, seven, nn.max_pool(x, (3, 3), (2, 2)))


class BlockE(nn.Module):
  """Branches at 8×8: 1×1, 3×3 as 1×3 beside 3×1 once and twice, and a pool."""

  pool: Callable[[jax.Array], jax.Array]  # `_average` or `_largest`

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    one = Conv(320, 1, name="branch1x1")(x)
    single = Conv(384, 1, name="branch3x3_1")(x)
    single = _join(Conv(384, (1, 3), name="branch3x3_2a")(single), Conv(384, (3, 1), name="branch3x3_2b")(single))
    double = Conv(448, 1, name="branch3x3dbl_1")(x)
    double = Conv(384, 3, name="branch3x3dbl_2")(double)
    double = _join(Conv(384, (1, 3), name="branch3x3dbl_3a")(double), Conv(384, (3, 1), name="branch3x3dbl_3b")(double))
    return _join(one, single, double, Conv(192, 1, name="branch_pool")(self.pool(x)))


def _average(x: jax.Array) -> jax.Array:
  """The mean of each pixel's 3×3 neighbours within the image."""
  counts_HxW = np.outer(*(np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3]))
  return nn.pool(x, 0.0, jax.lax.add, (3, 3), (1, 1), "SAME") / counts_HxW.astype(np.float32)[..., None]


def _largest(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), padding="SAME")


def _join(*branches: jax.Array) -> jax.Array:
  return jnp.concatenate(branches, axis=-1)
