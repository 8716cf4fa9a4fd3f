import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eqm_jax.data import shipped
from eqm_jax.equilibrium import sampler
from eqm_jax.evaluation import agreement, evaluate, pictures, samplers
from eqm_jax.networks.dit import DiT
from eqm_jax.training import sharding


@pytest.fixture
def batching():
  return samplers.Batching(sharding.make_mesh(-1, 1, 1), 10, jax.random.key(0), 4.0)


@pytest.fixture
def model_and_params(tiny_config):
  model = DiT(**tiny_config.model)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]
  # A new network answers zero: move it, so that samples move.
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)


def test_real_samples_are_at_no_distance_from_themselves(
  tiny_config, model_and_params, batching, tmp_path, monkeypatch
):
  """Real images instead of samples: a distance of zero, and the classifier's own accuracy."""
  source = shipped.digits()

  def real_ones(name, row, model, params, label_N, batching):
    images = np.stack([source.images[source.labels == label][i // 10] for i, label in enumerate(label_N)])
    zeros = np.zeros(len(label_N), np.int32)
    return samplers.Drawn(sampler.Result(images, zeros + 1, zeros, zeros, zeros), 1.0, len(label_N))

  monkeypatch.setattr(samplers, "draw", real_ones)
  tiny_config.evaluation.samples = 1700
  report = evaluate.evaluate(tiny_config, *model_and_params, source, batching, str(tmp_path))
  for row in report["rows"].values():
    assert row["frechet"] < 0.05
    assert row["label_agreement"] > 0.98
  assert 0.2 < report["real"]["frechet_between_halves"] < 0.4
  assert 0.95 < report["real"]["classifier_accuracy"] <= 1


def test_noise_is_far_from_the_digits_and_agrees_with_no_label(tiny_config, model_and_params, batching, tmp_path):
  for row in tiny_config.samplers.values():
    row.update(max_evaluations=1, threshold=0.0)
  tiny_config.evaluation.samples = 100
  report = evaluate.evaluate(tiny_config, *model_and_params, shipped.digits(), batching, str(tmp_path))
  for row in report["rows"].values():
    assert row["frechet"] > 5 and row["label_agreement"] < 0.3
    assert row["evaluations"]["mean"] == 1 and row["status"]["budget"] == 100


def test_repeats_take_turns_and_integrators_have_rows(tiny_config, model_and_params, batching, tmp_path):
  tiny_config.samplers.nag.update(rule="heun", momentum=0.0, max_evaluations=4)
  tiny_config.evaluation.update(repeats=2, timed=("gd",), pictured="none")
  report = evaluate.evaluate(tiny_config, *model_and_params, shipped.digits(), batching, str(tmp_path))
  assert report["rows"]["nag"]["evaluations"]["mean"] == 4
  table = (tmp_path / "evaluation.md").read_text()
  assert table.count("\n") == 5 and "| nag | heun |" in table
  assert not (tmp_path / "descent.png").exists()


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda c: c.evaluation.update(pictured="heun"), "'heun' is not one of the samplers: adaptive, gd, nag"),
    (lambda c: c.samplers.adaptive.update(rule="heun"), "'adaptive' integrates"),
    (lambda c: c.evaluation.update(samples=1), "samples = 1"),
    (lambda c: c.evaluation.update(repeats=0), "repeats = 0"),
    (lambda c: c.evaluation.update(timed=("fast",)), "'fast'"),
    (lambda c: c.evaluation.update(weights="best"), "'best'"),
    (lambda c: c.samplers.gd.update(step_size=-1.0), "samplers.gd: step_size = -1.0"),
  ],
)
def test_bad_options_are_refused(tiny_config, model_and_params, batching, tmp_path, change, text):
  change(tiny_config)
  with pytest.raises(ValueError, match=text):
    evaluate.evaluate(tiny_config, *model_and_params, shipped.digits(), batching, str(tmp_path))


def test_a_model_of_other_images_is_refused(tiny_config, model_and_params, batching, tmp_path):
  model, params = model_and_params
  with pytest.raises(ValueError, match="cannot be compared"):
    evaluate.evaluate(tiny_config, model.clone(num_classes=9), params, shipped.digits(), batching, str(tmp_path))


def test_the_classifier_knows_digits_and_not_shuffled_labels():
  source = shipped.digits()
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


def test_norm_curves_end_where_their_samples_stop():
  norms = np.full((20, 2), 5.0)
  short, long = (pictures.norm_curves(norms, np.asarray([n, n]), 1.0) for n in (3, 20))
  assert short.size == (720, 360) and not np.array_equal(np.asarray(short), np.asarray(long))
