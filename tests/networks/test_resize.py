"""Resizing: the positions that each method reads, PIL's bicubic, and arrays that are no images."""

import jax
import numpy as np
import pytest
from PIL import Image

from eqm_jax.networks import resize


@pytest.mark.parametrize(
  "method, length, size, expected",
  [
    ("tf1", 2, 4, [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]),
    ("half_pixel", 2, 4, [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]),
    ("tf1", 4, 2, [[1, 0, 0, 0], [0, 0, 1, 0]]),
    ("half_pixel", 4, 2, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
    ("tf1", 3, 3, np.eye(3)),
    ("half_pixel", 3, 3, np.eye(3)),
    ("bicubic", 3, 3, np.eye(3)),
    ("tf1", 1, 2, [[1], [1]]),
    ("half_pixel", 1, 2, [[1], [1]]),
    ("bicubic", 1, 2, [[1], [1]]),
  ],
)
def test_pixels_are_read_at_the_positions_of_the_method(method, length, size, expected):
  np.testing.assert_array_equal(resize.matrix(length, size, method), expected)


@pytest.mark.parametrize("shape", [(9, 30), (40, 17)])
def test_bicubic_is_that_of_pil(shape):
  """Of black and white noise, whose edges overshoot, and are clipped to the range of images."""
  image = 255 * np.random.default_rng(0).integers(0, 2, (1, *shape, 3)).astype(np.uint8)
  channels = [Image.fromarray(image[0, ..., c].astype(np.float32)).resize((24, 24), Image.BICUBIC) for c in range(3)]
  expected = np.stack([np.asarray(channel) for channel in channels], axis=-1)
  assert expected.min() < 0 and expected.max() > 255
  np.testing.assert_allclose(resize.resized(image, 24, "bicubic")[0], expected.clip(0, 255), atol=1e-3)


def test_four_neighbours_are_read_without_antialiasing():
  """Lines stay lines away from the border, however far apart the outputs are; at the border values repeat."""
  weights = resize.sampled_cubic(37, 16, 37 / 16.1)
  assert weights.shape == (16, 37) and np.all(np.count_nonzero(weights, axis=1) <= 4)
  np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
  positions = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
  np.testing.assert_allclose(weights[1:-1] @ np.arange(37.0), positions[1:-1], atol=0.2)  # cubics of a = −0.75 waver
  np.testing.assert_array_equal(resize.sampled_cubic(5, 5, 1.0), np.eye(5))


def test_images_of_any_height_and_width_are_traced():
  traced = jax.eval_shape(lambda x: resize.resized(x, 24, "bicubic"), jax.ShapeDtypeStruct((2, 9, 30, 3), np.uint8))
  assert traced.shape == (2, 24, 24, 3) and traced.dtype == np.float32


@pytest.mark.parametrize("shape, seen", [((1, 13, 40, 3), "13 × 40"), ((1, 40, 2, 3), "40 × 2")])
def test_images_smaller_than_a_patch_are_refused(shape, seen):
  with pytest.raises(ValueError, match=f"A network takes images of at least 14 × 14 pixels, one patch, but got {seen}"):
    resize.check_images("A network", np.zeros(shape, np.uint8), 14)
  resize.check_images("A network", np.zeros(shape, np.uint8))
