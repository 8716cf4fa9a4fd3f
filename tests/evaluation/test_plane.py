"""Landscapes over the plane."""

import json

import numpy as np
import pytest
from conftest import load_config
from PIL import Image

from eqm_jax import modes
from eqm_jax.data import builtin
from eqm_jax.evaluation import plane


def test_the_potential_of_a_gradient_is_its_energy():
  line = np.linspace(-2, 2, 41)
  x, y = np.meshgrid(line, line)
  energy = x**2 + 0.5 * y**2 + 0.3 * x * y
  f = np.stack([2 * x + 0.3 * y, y + 0.3 * x], axis=-1)
  np.testing.assert_allclose(plane.potential(f, line[1] - line[0]), energy, atol=1e-3)


def test_distances_see_what_is_far_and_what_is_missed():
  data = builtin.plane("eight_gaussians", 400).images
  new = builtin.plane("eight_gaussians", 400, seed=1)
  same, missing = plane.distances(new.images, data), plane.distances(new.images[new.labels < 4], data)
  assert same["to_data"] < 0.1 and same["from_data"] < 0.1
  assert missing["to_data"] < 0.1 and missing["from_data"] > 0.3
  assert plane.distances(new.images + 3, data)["to_data"] > 1


@pytest.mark.slow
def test_descents_end_on_the_data(tmp_path):
  """Ten seconds of training bring the samples most of the way from the noise to the moons."""
  config = load_config("toy2d", "two_moons-smoke")
  config.model.update(width=32, depth=2)
  config.train.update(steps=800, batch_size=128, log_every=400)
  config.checkpoint.every = 800
  config.optimizer.ema_decay = 0.98
  config.evaluation.num_samples = 200
  for row in config.samplers.values():
    row.max_nfe = 150
  modes.run("train", config, str(tmp_path))
  found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["rows"]["adaptive"]
  data = builtin.plane("two_moons")
  noise = np.random.default_rng(0).normal(size=(200, 1, 1, 2))
  new = plane.distances(builtin.plane("two_moons", 200, seed=7).images, data.images)
  assert found["to_data"] < 0.25 * plane.distances(noise, data.images)["to_data"]
  assert found["from_data"] < 4 * new["from_data"] and found["classifier_accuracy"] > 0.9
  for name in ("plane.png", "samples_adaptive.png", "samples_fixed.png"):
    assert Image.open(tmp_path / "evaluation" / name).size[0] > 300
