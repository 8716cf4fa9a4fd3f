"""Pictures of samples and of their descents."""

import numpy as np
from PIL import Image

from eqm_jax import plotting


def test_a_grid_shows_every_image_in_its_place():
  images = np.full((5, 2, 2, 1), -1.0)
  images[3] = 1.0
  picture = np.asarray(plotting.grid(images, columns=3))
  zoom = 48 // 2
  assert picture.shape == ((2 * 3 + 1) * zoom, (3 * 3 + 1) * zoom, 3)
  assert picture[4 * zoom, zoom].tolist() == [255, 255, 255]  # row 1, column 0: image 3
  assert picture[zoom, zoom].tolist() == [0, 0, 0]
  colour = np.zeros((1, 64, 64, 4))
  colour[..., 0] = 1
  assert np.asarray(plotting.grid(colour, 1))[5, 5].tolist() == [255, 128, 128]


def test_an_animation_has_every_frame(tmp_path):
  frames = [plotting.grid(np.full((2, 4, 4, 1), value), 2) for value in (-1.0, 0.0, 1.0)]
  plotting.animation(frames, str(tmp_path / "a.gif"))
  with Image.open(tmp_path / "a.gif") as gif:
    assert gif.n_frames == 3


def test_the_histogram_is_a_picture():
  histogram = plotting.nfe_histogram(np.asarray([3, 10, 20]), 25, "title")
  assert histogram.size == (720, 360) and len(np.unique(np.asarray(histogram))) > 10


def test_norm_curves_end_where_their_samples_stop():
  norms = np.full((20, 2), 5.0)
  short, long = (plotting.norm_curves(norms, np.asarray([n, n]), 1.0) for n in (3, 20))
  assert short.size == (720, 360) and not np.array_equal(np.asarray(short), np.asarray(long))
