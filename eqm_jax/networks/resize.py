"""Images of any size resized to a network's input, each axis by a matrix, and the check that they are images."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EXACT = jax.lax.Precision.HIGHEST  # distances between features would show the bfloat16 of a TPU's or a GPU's TF32
CATMULL_ROM = -0.5  # a of the cubic kernel of PIL, and of PyTorch with antialiasing
PYTORCH = -0.75  # a of the cubic kernel of PyTorch without antialiasing


def check_images(network: str, images: Any, smallest: int = 1):
  """Refuses what is not a batch of RGB images.

  Args:
    network: its name, for messages.
    images: uint8 [B, H, W, 3], in numpy, JAX or traced by it.
    smallest: height and width that the network needs.

  Raises:
    ValueError: with the type and shape seen, and the line that converts floats and grey images.
  """
  shape, dtype = (getattr(images, name, None) for name in ("shape", "dtype"))
  if shape is None or dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
    seen = f"a {type(images).__name__}" if shape is None else f"{dtype} {tuple(shape)}"
    raise ValueError(
      f"{network} takes images uint8 [B, H, W, 3], B ≥ 1, in 0..255, but got {seen}: convert floats in [−1, 1] by "
      "np.clip(np.rint(127.5 * x + 127.5), 0, 255).astype(np.uint8), grey images [B, H, W, 1] by np.repeat(x, 3, -1)"
    )
  if min(shape[1:3]) < smallest:
    raise ValueError(
      f"{network} takes images of at least {smallest} × {smallest} pixels, one patch, but got {shape[1]} × {shape[2]}: "
      "compare smaller ones in 'raw' or 'classifier' features"
    )


def resized(images_BxHxWxC: jax.Array, size: int, method: str) -> jax.Array:
  """Images in 0..255 of any size as float32 [B, size, size, C], still in 0..255; `matrix` has the methods."""
  _, H, W, _ = images_BxHxWxC.shape
  rows, columns = (matrix(length, size, method) for length in (H, W))
  x = images_BxHxWxC.astype(jnp.float32)
  x = jnp.einsum("ih,bhwc->biwc", rows, x, precision=EXACT)
  x = jnp.einsum("jw,biwc->bijc", columns, x, precision=EXACT)
  return jnp.clip(x, 0, 255) if method == "bicubic" else x  # a cubic kernel overshoots at edges


def matrix(length: int, size: int, method: str) -> np.ndarray:
  """The matrix [size, length] that resizes one axis.

  Args:
    length: pixels before.
    size: pixels after.
    method: "tf1": bilinear as in TensorFlow 1, pixel i is read at i·length/size. "half_pixel": bilinear between pixel
      centres. "bicubic": the same with the cubic kernel of PIL, which is as wide as an output pixel (antialiasing).
  """
  if method == "bicubic":
    return antialiased_cubic(length, size)
  target = np.arange(size)
  scale = length / size
  position = target * scale if method == "tf1" else np.maximum((target + 0.5) * scale - 0.5, 0)
  below = np.minimum(np.floor(position).astype(int), length - 1)
  above = np.minimum(below + 1, length - 1)
  weights = np.zeros((size, length))
  weights[target, below] += 1 - (position - below)
  weights[target, above] += position - below
  return weights.astype(np.float32)


def antialiased_cubic(length: int, size: int) -> np.ndarray:
  """The matrix [size, length] of a cubic kernel that is never narrower than an output pixel, as PIL has it."""
  scale = length / size
  centres = (np.arange(size) + 0.5) * scale
  weights = _cubic((np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1), CATMULL_ROM)
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def sampled_cubic(length: int, size: int, scale: float) -> np.ndarray:
  """The matrix [size, length] of a cubic kernel of four neighbours, as PyTorch has it without antialiasing.

  Args:
    length: values before.
    size: values after.
    scale: distance of two outputs, in inputs; length/size, unless the caller rounds otherwise.
  """
  position = (np.arange(size) + 0.5) * scale - 0.5
  below = np.floor(position).astype(int)
  weights = np.zeros((size, length))
  for neighbour in range(-1, 3):
    index = np.clip(below + neighbour, 0, length - 1)  # the border is repeated
    np.add.at(weights, (np.arange(size), index), _cubic(position - below - neighbour, PYTORCH))
  return weights.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel (1981), zero from |x| = 2 on."""
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x < 1, near, np.where(x < 2, far, 0))
