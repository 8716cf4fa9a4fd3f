import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eqm_jax.data import sources
from eqm_jax.equilibrium import sampler
from eqm_jax.evaluation import agreement, evaluate, pictures
from eqm_jax.networks.dit import DiT
from eqm_jax.training import sharding


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(-1, 1, 1)


@pytest.fixture
def model_and_params(tiny_config):
  model = DiT(**tiny_config.model)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]
  # A new network answers zero: move it, so that samples move.
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)


@dataclasses.dataclass(frozen=True)
class Bowls:
  """A model whose field is steeper for some labels, so that samples need different numbers of steps."""

  num_classes: int = 10
  input_shape: tuple[int, ...] = (8, 8, 1)

  def apply(self, variables, x, label):
    return (variables["params"] + label[:, None, None, None]) * x


def test_samples_do_not_depend_on_the_batches(tiny_config, mesh):
  labels = np.arange(13, dtype=np.int32) % 10
  row = tiny_config.samplers.adaptive
  row.update(threshold=1.0, step_size=0.04, max_evaluations=60)
  whole, _ = evaluate.sample(row, Bowls(), 2.0, labels, 0, 13, mesh, "")
  parts, seconds = evaluate.sample(row, Bowls(), 2.0, labels, 0, 5, mesh, "")
  assert whole.x.shape == (13, 8, 8, 1) and seconds > 0
  np.testing.assert_allclose(parts.x, whole.x, atol=1e-6)
  np.testing.assert_array_equal(parts.evaluations_B, whole.evaluations_B)
  assert len(set(whole.evaluations_B)) > 5, "the samples should differ in their evaluations"
  noise = sampler.start_noise(jax.random.key(0), np.arange(13), (8, 8, 1))
  steepness = (2.0 + labels)[:, None, None, None]
  updates = (whole.evaluations_B - 1)[:, None, None, None]
  np.testing.assert_allclose(whole.x, noise * (1 - 0.04 * steepness) ** updates, atol=1e-5)


def test_real_samples_are_at_no_distance_from_themselves(tiny_config, model_and_params, mesh, tmp_path, monkeypatch):
  """Real images instead of samples: a distance of zero, and the classifier's own accuracy."""
  source = sources.digits()

  def real_ones(row, model, params, label_N, *rest):
    order = np.argsort(source.labels % 10, kind="stable")
    images = np.stack([source.images[order][source.labels[order] == label][i // 10] for i, label in enumerate(label_N)])
    zeros = np.zeros(len(label_N), np.int32)
    return sampler.Result(x=images, evaluations_B=zeros, norm_B=zeros, status_B=zeros), 1.0

  monkeypatch.setattr(evaluate, "sample", real_ones)
  tiny_config.evaluation.samples = 1700
  report = evaluate.evaluate(tiny_config, *model_and_params, source, mesh, str(tmp_path))
  for row in report["rows"].values():
    assert row["frechet"] < 0.05
    assert row["label_agreement"] > 0.98
  assert 0.2 < report["real"]["frechet_between_halves"] < 0.4
  assert 0.95 < report["real"]["classifier_accuracy"] <= 1


def test_noise_is_far_from_the_digits_and_agrees_with_no_label(tiny_config, model_and_params, mesh, tmp_path):
  for row in tiny_config.samplers.values():
    row.update(max_evaluations=1, threshold=0.0)
  tiny_config.evaluation.samples = 300
  report = evaluate.evaluate(tiny_config, *model_and_params, sources.digits(), mesh, str(tmp_path))
  for row in report["rows"].values():
    assert row["frechet"] > 5 and row["label_agreement"] < 0.3
    assert row["evaluations"]["mean"] == 1 and row["status"]["budget"] == 300


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda c: c.evaluation.update(pictured="heun"), "'heun' is not one of the samplers: adaptive, gd, nag"),
    (lambda c: c.evaluation.update(samples=1), "samples = 1"),
  ],
)
def test_bad_options_are_refused(tiny_config, model_and_params, mesh, tmp_path, change, text):
  change(tiny_config)
  with pytest.raises(ValueError, match=text):
    evaluate.evaluate(tiny_config, *model_and_params, sources.digits(), mesh, str(tmp_path))


def test_a_timed_network_is_refused(tiny_config, model_and_params, mesh, tmp_path):
  model, params = model_and_params
  with pytest.raises(ValueError, match="told the time"):
    evaluate.evaluate(tiny_config, model.clone(time_input=True), params, sources.digits(), mesh, str(tmp_path))


def test_the_classifier_knows_digits_and_not_shuffled_labels():
  source = sources.digits()
  classifier = agreement.Classifier(source.images, source.labels)
  assert classifier.held_out_accuracy > 0.97
  assert classifier.agreement(source.images, (source.labels + 1) % 10) < 0.02


def test_a_grid_shows_every_image_in_its_place():
  images = np.full((5, 2, 2, 1), -1.0)
  images[3] = 1.0
  picture = np.asarray(pictures.grid(images, columns=3))
  zoom = 48 // 2
  assert picture.shape == ((2 * 3 + 1) * zoom, (3 * 3 + 1) * zoom, 3)
  assert picture[4 * zoom, zoom].tolist() == [255, 255, 255]  # row 1, column 0: image 3
  assert picture[zoom, zoom].tolist() == [0, 0, 0]
  colour = np.zeros((1, 64, 64, 4))
  colour[..., 0] = 1
  assert np.asarray(pictures.grid(colour, 1))[5, 5].tolist() == [255, 128, 128]


def test_an_animation_has_every_frame(tmp_path):
  frames = [pictures.grid(np.full((2, 4, 4, 1), value), 2) for value in (-1.0, 0.0, 1.0)]
  pictures.animation(frames, str(tmp_path / "a.gif"))
  with Image.open(tmp_path / "a.gif") as gif:
    assert gif.n_frames == 3


def test_the_histogram_is_a_picture():
  histogram = pictures.evaluations_histogram(np.asarray([3, 10, 20]), 25, "title")
  assert histogram.size == (720, 360) and len(np.unique(np.asarray(histogram))) > 10
