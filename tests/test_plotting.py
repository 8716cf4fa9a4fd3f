"""Pictures of samples and of their descents."""

import os
import subprocess
import sys

import numpy as np
from conftest import ROOT
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
  assert plotting.grid(np.zeros((1, 32, 32, 3)), 1).width == 2 * (32 + 2)
  colour = np.zeros((1, 64, 64, 4))
  colour[..., 0] = 1
  assert np.asarray(plotting.grid(colour, 1))[5, 5].tolist() == [255, 128, 128]


def test_captions_are_lines_below_the_rows_that_have_some():
  images = np.full((6, 8, 8, 1), -1.0)
  plain = plotting.grid(images, 3, zoom=8)
  picture = plotting.grid(images, 3, zoom=8, captions=["0 (Zoë)", "", "a name that is far too long", "", "", ""])
  assert picture.width == plain.width and picture.height == plain.height + plotting.CAPTION_HEIGHT
  pixels, row = np.asarray(picture), 9 * 8
  np.testing.assert_array_equal(pixels[:row], np.asarray(plain)[:row])
  np.testing.assert_array_equal(pixels[row + plotting.CAPTION_HEIGHT :], np.asarray(plain)[row:])
  below = pixels[row : row + plotting.CAPTION_HEIGHT, :, 0] < 128
  assert below[:, :row].any() and not below[:, row : 2 * row].any() and below[:, 2 * row : -2].any()
  named = plotting.grid(images, 3, captions=plotting.row_captions(["a longer name of this row", "b"], 3))
  assert named.height == plain.height + 2 * plotting.CAPTION_HEIGHT
  assert (np.asarray(named)[row : row + plotting.CAPTION_HEIGHT, row : 2 * row, 0] < 128).any()


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


def test_errors_over_levels_are_drawn_where_there_are_samples():
  gamma = np.asarray([0.05, 0.07, 0.95, 0.93])
  exact, wrong = (plotting.level_errors(gamma, {"network": gamma + error}, bins=10) for error in (0.0, 0.2))
  assert exact.size == (1080, 432) and not np.array_equal(np.asarray(exact), np.asarray(wrong))


# A notebook's terminal names a backend that this environment lacks; pyplot, imported later, is not ours to mend.
DRAWS = """
import os, sys
from eqm_jax import plotting
figure, axes = plotting.figure(2, 2)
assert plotting.rendered(figure).size == (240, 240) and "matplotlib.pyplot" not in sys.modules
assert os.environ["MPLBACKEND"] == "module://no_such.backend_inline"
figure.savefig(sys.argv[1])
"""


def test_figures_need_no_backend(tmp_path):
  variables = {**os.environ, "MPLBACKEND": "module://no_such.backend_inline"}
  subprocess.run([sys.executable, "-c", DRAWS, str(tmp_path / "a.svg")], check=True, cwd=ROOT, env=variables)
  assert (tmp_path / "a.svg").stat().st_size
