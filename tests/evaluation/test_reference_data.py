import json

import numpy as np
import pytest
from conftest import load_config

from eqm_jax import distributed
from eqm_jax.data import builtin
from eqm_jax.data.samples import Images
from eqm_jax.evaluation import features, metrics, reference_data
from eqm_jax.evaluation.metrics import GaussianStatistics
from eqm_jax.plotting import to_uint8

SETTINGS = {"name": "inception", "resize": "tf1", "sha256": "0" * 64}


ABOUT = json.dumps({"features": SETTINGS})


def few_numbers(images: np.ndarray) -> dict[str, np.ndarray]:
  """Features that are quickly computed, in the place of Inception's."""
  x = images.reshape(len(images), -1).astype(np.float32)
  return {"pool": x[:, :6] / 255, "spatial": x[:, 6:9], "logits": x[:, :2]}


@pytest.fixture
def space():
  return features.Features("inception", SETTINGS, few_numbers, {"pool": 6, "spatial": 3})


@pytest.fixture
def photographs():
  return builtin.photographs(size=8, stride=8)


def test_statistics_are_computed_saved_and_read_by_others(space, photographs, tmp_path):
  known = reference_data.compute_statistics(photographs, space, True, threads=2)
  path = str(tmp_path / "new" / "statistics.npz")
  reference_data.save(path, known)
  again = reference_data.load(path, space)
  pixels = np.rint(127.5 * photographs.images + 127.5).reshape(len(photographs), -1)
  with np.load(path) as file:  # by the names that ADM's and pytorch-fid's programs look for
    np.testing.assert_allclose(file["mu"], pixels[:, :6].mean(axis=0) / 255, rtol=1e-6)
    np.testing.assert_allclose(file["sigma_s"], np.cov(pixels[:, 6:9].T), rtol=1e-6)
  for kind in ("pool", "spatial"):
    np.testing.assert_array_equal(again.gaussians[kind].covariance, known.gaussians[kind].covariance)
  np.testing.assert_array_equal(again.features, known.features)
  assert again.origin["samples"] == len(photographs) and again.origin["features"] == SETTINGS
  with pytest.raises(ValueError, match="exists already"):
    reference_data.save(path, known)


def test_large_data_is_read_in_parts_and_some_of_it_stands_for_all(space, photographs, monkeypatch):
  whole = reference_data.compute_statistics(photographs, space, True, threads=2)
  monkeypatch.setattr(reference_data, "MAX_FEATURES", 100)
  monkeypatch.setattr(reference_data, "CHUNK", 64)
  parts = reference_data.compute_statistics(photographs, space, True, threads=2)
  assert len(photographs) > 500 and len(parts.features) == 100
  for kind in ("pool", "spatial"):
    np.testing.assert_allclose(parts.gaussians[kind].mean, whole.gaussians[kind].mean, rtol=1e-9)
    np.testing.assert_allclose(parts.gaussians[kind].covariance, whole.gaussians[kind].covariance, rtol=1e-9)


def test_processes_share_the_parts_and_merge_what_they_found(space, photographs, monkeypatch):
  """Each of three processes reads its share; what all have sent is put in the place of the exchange."""
  whole = reference_data.compute_statistics(photographs, space, True, threads=2)
  monkeypatch.setattr(reference_data, "MAX_FEATURES", 100)
  monkeypatch.setattr(reference_data, "CHUNK", 64)
  sent = {}
  for process in range(3):
    monkeypatch.setattr(distributed, "process_index_and_count", lambda p=process: (p, 3))
    monkeypatch.setattr(
      distributed, "from_all", lambda array, p=process: sent.setdefault(p, []).append(array) or array[None]
    )
    reference_data.compute_statistics(photographs, space, True, threads=2)
  received = iter(np.stack(arrays) for arrays in zip(*(sent[p] for p in range(3))))
  monkeypatch.setattr(distributed, "from_all", lambda array: next(received))
  merged = reference_data.compute_statistics(photographs, space, True, threads=2)
  assert sum(int(sent[p][0]) for p in range(3)) == len(photographs)
  for kind in ("pool", "spatial"):
    np.testing.assert_allclose(merged.gaussians[kind].covariance, whole.gaussians[kind].covariance, rtol=1e-9)


def test_adms_file_gives_statistics_and_images(space, photographs, tmp_path):
  images = np.rint(127.5 * photographs.images + 127.5).astype(np.uint8)[:40]
  found = few_numbers(images)
  pool, spatial = (GaussianStatistics.of(found[kind]).gaussian for kind in ("pool", "spatial"))
  path = tmp_path / "VIRTUAL.npz"
  np.savez(path, arr_0=images, mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance)
  known = reference_data.load(str(path), space)
  np.testing.assert_array_equal(known.features, found["pool"])
  np.testing.assert_array_equal(known.gaussians["spatial"].mean, spatial.mean)
  assert known.origin == {"features": "not recorded", "program": "ADM", "from": "VIRTUAL.npz"}
  half_pixel = features.Features("inception", {**SETTINGS, "resize": "half_pixel"}, few_numbers, space.sizes)
  with pytest.raises(ValueError, match="ADM's statistics are of inception with resize tf1, not of .*half_pixel"):
    reference_data.load(str(path), half_pixel)


def test_pytorch_fids_file_gives_statistics_only(space, tmp_path):
  path = tmp_path / "fid.npz"
  np.savez(path, mu=np.ones(6), sigma=np.eye(6))
  known = reference_data.load(str(path), space)
  assert known.features is None and set(known.gaussians) == {"pool"} and known.origin["program"] == "pytorch-fid"


@pytest.mark.parametrize(
  "arrays, text",
  [
    (dict(mu=np.ones(5), sigma=np.eye(5)), r"shapes \(5,\) and \(5, 5\), but pool features of inception have 6"),
    (dict(mu=np.ones(6), sigma=np.eye(5)), "pool features of inception have 6 dimensions"),
    (dict(mu=np.ones(6), sigma=np.full((6, 6), np.nan)), "pool statistics are not finite: compute them again"),
    (dict(mu=np.ones(6), sigma=-np.eye(6)), "pool statistics have no covariance"),
    (dict(mu=np.ones(6), sigma=np.triu(np.ones((6, 6)))), "symmetric"),
    (dict(mu=np.full(6, "1"), sigma=np.eye(6)), "pool statistics are <U1 and float64: give numbers"),
    (dict(mu=np.array([None] * 6), sigma=np.eye(6)), "array 'mu' holds Python objects"),
    (dict(mu=np.ones(6)), "holds no statistics .*mu.*--mode=statistics"),
    (dict(mu=np.ones(6), sigma=np.eye(6), arr_0=np.zeros((3, 8, 8, 1))), r"arr_0 is float64\[3, 8, 8, 1\], but images"),
    (dict(mu=np.ones(6), sigma=np.eye(6), about="no JSON"), "its record `about` is damaged"),
    (dict(mu=np.ones(6), sigma=np.eye(6), about="[1]"), "its record `about` is damaged"),
    (dict(mu=np.ones(6), sigma=np.eye(6), about="{}"), "statistics of None, but the samples' features are"),
    (
      dict(mu=np.ones(6), sigma=np.eye(6), about=ABOUT, features=np.ones((3, 5))),
      r"features of shape \(3, 5\) are not",
    ),
    (dict(arr_0=np.zeros((3, 8, 8, 3), np.uint8)), r"holds no statistics \(mu and sigma\)"),
    (
      dict(mu=np.ones(6), sigma=np.eye(6), about=json.dumps({"features": {**SETTINGS, "resize": "half_pixel"}})),
      "statistics of .*half_pixel.*, but the samples' features are .*tf1",
    ),
  ],
)
def test_statistics_that_do_not_fit_are_refused(space, tmp_path, arrays, text):
  path = tmp_path / "bad.npz"
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match=f"evaluation.inception.reference: .*bad.npz: .*{text}"):
    reference_data.load(str(path), space)


def test_files_that_are_no_statistics_are_named(space, tmp_path):
  with pytest.raises(ValueError, match="nothing.npz: no such statistics. --mode=statistics"):
    reference_data.load(str(tmp_path / "nothing.npz"), space)
  whole = tmp_path / "whole.npz"
  np.savez(whole, mu=np.ones(6), sigma=np.eye(6))
  (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:200])
  with pytest.raises(ValueError, match="inception.reference: .*cut.npz: not a complete .npz"):
    reference_data.load(str(tmp_path / "cut.npz"), space)


def test_data_that_gives_no_statistics_is_refused(space):
  grey = Images(np.zeros((9, 8, 8, 3), np.float32), np.zeros(9, np.int64), 1)
  with pytest.raises(ValueError, match="all rows are the same.*constant"):
    reference_data.compute_statistics(grey, space, True, threads=1)
  one = Images(np.zeros((1, 8, 8, 3), np.float32), np.zeros(1, np.int64), 1)
  with pytest.raises(ValueError, match="has 1 sample, but .* need 2: give data.source more"):
    reference_data.compute_statistics(one, space, True, threads=1)


def several(count: int, copies: int = 1) -> Images:
  images = np.random.default_rng(0).uniform(-1, 1, (count, 8, 8, 3)).astype(np.float32)
  return Images(np.tile(images, (copies, 1, 1, 1)), np.arange(count * copies) % 2, 2)


@pytest.mark.parametrize("count, copies", [(2, 1), (3, 1), (11, 1), (2, 6)])
def test_few_real_samples_have_statistics_and_are_at_no_distance_from_themselves(space, tmp_path, count, copies):
  source = several(count, copies)
  known = reference_data.compute_statistics(source, space, True, threads=1)
  reference_data.save(str(tmp_path / "few.npz"), known)
  again = reference_data.load(str(tmp_path / "few.npz"), space)
  found = metrics.compute(few_numbers(to_uint8(source.images)), again)
  assert found["frechet"] < 1e-3 and found["spatial_frechet"] < 1e-3
  assert (found.get("precision"), found.get("recall")) == ((1, 1) if len(source) > 3 else (None, None))


def test_a_half_of_copies_is_a_half_too(space):
  """Nine copies and two others: a half may be all the same, which ended the evaluation."""
  images = np.concatenate([several(1, 9).images, several(3).images[1:]])
  known = reference_data.compute_statistics(Images(images, np.zeros(11, int), 1), space, True, threads=1)
  assert reference_data._between_real(known)["frechet_between_halves"] > 0


@pytest.mark.parametrize(
  "labels, text",
  [
    ([0] * 12, "the data has 12 images of 1 classes: set it to False"),
    ([0] * 11 + [1], "a single one of class 1: set"),
    ([0, 1] * 2, "two images of each and four on average; the data has 4 images of 2 classes: set"),
    ([0, 0, 0, 0, 7, 7, 7, 7], ""),
  ],
)
def test_classifier_accuracy_needs_images_to_hold_out(labels, text):
  images = np.random.default_rng(0).uniform(-1, 1, (len(labels), 8, 8, 1))
  if not text:
    features.PixelClassifier(images, np.asarray(labels))  # classes without an image do no harm
    return
  with pytest.raises(ValueError, match=f"evaluation.classifier_accuracy = True: a classifier needs.*{text}"):
    features.PixelClassifier(images, np.asarray(labels))


def test_a_classifier_needs_classes():
  options = load_config("digits").evaluation
  images = np.zeros((8, 8, 8, 1), np.float32)
  with pytest.raises(
    ValueError,
    match="two classes, two images of each and four on average; the data has 8 images of 1 classes: name 'raw'",
  ):
    features.open_features("classifier", options, (images, np.zeros(8, int), 1), True)


@pytest.mark.slow
def test_the_classifier_is_the_same_each_time_and_sees_the_digits():
  options = load_config("digits").evaluation
  options.classifier.steps = 25
  digits = builtin.digits()
  given = digits.images, digits.labels, 10
  one, other = (features.open_features("classifier", options, given, True) for _ in range(2))
  assert one.settings == other.settings and one.settings["held_out_accuracy"] > 0.8
  images = np.rint(127.5 * digits.images[:70] + 127.5).astype(np.uint8)
  found = one.extract(images)
  assert {kind: array.shape for kind, array in found.items()} == {
    "pool": (70, 64), "spatial": (70, 2 * 2 * 7), "logits": (70, 10)
  }  # fmt: skip
  assert np.mean(found["logits"].argmax(axis=1) == digits.labels[:70]) > 0.8
  np.testing.assert_array_equal(found["pool"], other.extract(images)["pool"])
