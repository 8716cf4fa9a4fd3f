import math

import numpy as np
import pytest
import scipy.linalg
import sklearn.metrics.pairwise
import sklearn.neighbors
from conftest import ROOT

from eqm_jax.evaluation import metrics
from eqm_jax.evaluation.metrics import frechet_distance, inception_score, kernel_distance, mind, precision_recall

GOLDEN = np.load(ROOT / "tests" / "reference" / "distances.npz")
A, B = GOLDEN["features_a"], GOLDEN["features_b"]
MIND = np.load(ROOT / "tests" / "reference" / "mind.npz")


def test_all_agree_with_the_libraries():
  """The parity table: `pytest -n 0 -s` shows it."""
  score, deviation = inception_score(GOLDEN["isc_logits"])
  precision, recall = precision_recall(A, B)
  found = {
    "fid": (frechet_distance(A, B), 1e-8),
    "fid_small": (frechet_distance(A[:40], B[:30]), 1e-5),  # 40 and 30 rows of 64 features: without full rank
    "isc_mean": (score, 1e-10),
    "isc_std": (deviation, 1e-10),
    "precision": (precision, 1e-7),  # the library's is float32
    "recall": (recall, 1e-7),
    "mind": (mind(MIND["features_a"], MIND["features_b"], MIND["directions"]), 1e-12),
  }
  print("\n| figure | ours | theirs | relative difference |\n|---|---|---|---|")
  for name, (value, tolerance) in found.items():
    expected = float((MIND if name == "mind" else GOLDEN)[name])
    print(f"| {name} | {value:.10g} | {expected:.10g} | {abs(value / expected - 1):.1e} |")
    np.testing.assert_allclose(value, expected, rtol=tolerance, err_msg=name)


def test_frechet_agrees_with_the_matrix_square_root():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(200, 6)), rng.normal(size=(100, 6)) @ rng.normal(size=(6, 6)) + 1
  root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
  expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
  np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6)
  assert abs(frechet_distance(a, a)) < 1e-8
  np.testing.assert_allclose(frechet_distance(a[:, :1], a[:, :1] + 2), 4.0)


def few(count: int, size: int, copies: int = 1, scale: float = 1.0) -> np.ndarray:
  return np.tile(scale * np.random.default_rng(count).normal(size=(count, size)) + 1, (copies, 1)).astype(np.float32)


@pytest.mark.parametrize(
  "count, size, copies", [(2, 3, 1), (2, 300, 1), (3, 300, 5), (11, 300, 1), (11, 3, 4), (40, 64, 1)]
)
@pytest.mark.parametrize("scale", [1, 300])
def test_a_set_is_at_no_distance_from_itself(count, size, copies, scale):
  """However few rows it has, and copies of them: its covariance has no full rank."""
  features = few(count, size, copies, scale)
  assert 0 <= frechet_distance(features, features) < 1e-6
  if len(features) > 3:
    assert precision_recall(features, features) == (1, 1)


def test_copies_are_where_the_original_is():
  """Radii of zero: a set of copies covers itself, and what is elsewhere covers none of it."""
  copies = np.repeat(np.abs(few(6, 784, scale=10)), 5, axis=0)
  assert precision_recall(copies, copies) == (1, 1)
  assert precision_recall(copies[:15], copies) == (1, 0.5)
  nudged = copies * (1 + 1e-7 * np.random.default_rng(0).choice([-1, 0, 1], copies.shape)).astype(np.float32)
  assert precision_recall(nudged, copies) == (1, 1), "what another batch rounds otherwise is the same"
  assert precision_recall(copies + 1, copies) == (0, 0)


def test_frechet_of_few_rows_in_closed_form():
  """Two rows span a line: parallel ones differ in their spread, orthogonal ones share nothing."""
  a, b = np.zeros((2, 50)), np.zeros((2, 50))
  a[:, 0], b[:, 0] = (-3, 3), (-1, 1)
  np.testing.assert_allclose(frechet_distance(a, b), 2 * (3 - 1) ** 2)
  np.testing.assert_allclose(frechet_distance(a, np.roll(b, 7, axis=1)), 2 * (9 + 1))
  np.testing.assert_allclose(frechet_distance(a, np.concatenate([a, a]) + 2), 4 * 50 + 18 * (1 - math.sqrt(2 / 3)) ** 2)


def test_the_kernel_distance_of_sets_below_the_size_of_a_subset():
  a, b = few(11, 5), few(11, 5)[::-1] + 1
  assert kernel_distance(a, b) == kernel_distance(a, b, subsets=1, subset_size=11) and kernel_distance(a, b)[1] == 0
  assert kernel_distance(a[:2], b)[1] > 0, "subsets of the larger set differ"
  constant = np.ones((3, 5))
  assert kernel_distance(constant, constant) == (0, 0)


def test_kernel_distance_is_the_unbiased_estimate():
  rng = np.random.default_rng(1)
  a, b = rng.normal(size=(60, 8)), rng.normal(size=(60, 8)) + 0.5
  kernel = lambda x, y: sklearn.metrics.pairwise.polynomial_kernel(x, y, degree=3, gamma=1 / 8, coef0=1)  # noqa: E731
  aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
  off = ~np.eye(60, dtype=bool)
  expected = aa[off].mean() + bb[off].mean() - 2 * ab.mean()
  mean, deviation = kernel_distance(a, b, subset_size=1000)  # every subset is the whole
  np.testing.assert_allclose(mean, expected, rtol=1e-10)
  assert deviation < 1e-12
  # Of smaller subsets the same on average: it is unbiased.
  mean, deviation = kernel_distance(a, b, subsets=2000, subset_size=20)
  assert abs(mean - expected) < 4 * deviation / math.sqrt(2000) and deviation > 0
  same, deviation = kernel_distance(rng.normal(size=(300, 8)), rng.normal(size=(300, 8)), subset_size=100)
  assert abs(same) < deviation


def test_mind_of_a_shift_and_of_a_stretch():
  """A shift by v costs 3D·mean (u·v)², about 3‖v‖²; a set at twice the size that of the first moments."""
  features, shift = few(50, 6).astype(np.float64), np.linspace(-1, 2, 6)
  directions = np.random.default_rng(0).normal(size=(4000, 6))
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  exact = 18 * np.mean((directions @ shift) ** 2)
  np.testing.assert_allclose(mind(features, features[::-1] + shift, directions), exact, rtol=1e-10)
  np.testing.assert_allclose(mind(features, features + shift), 3 * shift @ shift, rtol=0.1)
  np.testing.assert_allclose(mind(features, 2 * features), 3 * np.mean(np.sum(features**2, axis=1)), rtol=0.1)


def test_mind_sees_what_means_and_covariances_do_not():
  """Two clusters with the moments of a Gaussian: no Fréchet distance, which a model can be trained to."""
  rng = np.random.default_rng(0)
  gaussian, clusters = rng.normal(size=(400, 3)), rng.choice([-1.0, 1.0], (400, 3))

  def whitened(x):
    return np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), (x - x.mean(axis=0)).T).T

  gaussian, clusters, other = map(whitened, (gaussian, clusters, rng.normal(size=(400, 3))))
  assert frechet_distance(gaussian, clusters) < 1e-9
  assert mind(gaussian, clusters) > 5 * mind(gaussian, other)


def test_mind_depends_on_the_seed_alone_and_not_on_the_chunks(monkeypatch):
  whole = mind(A, A[::-1] + 1, seed=1)
  assert mind(A, A[::-1] + 1, seed=1) == whole != mind(A, A[::-1] + 1, seed=2)
  monkeypatch.setattr(metrics, "DIRECTIONS_AT_ONCE", 7)
  monkeypatch.setattr(metrics, "CAST_ROWS", 64)
  np.testing.assert_allclose(mind(A, A[::-1] + 1, seed=1), whole, rtol=1e-12)


def test_mind_of_sets_of_unequal_size_takes_rows_of_the_larger():
  assert len(A) > len(B)
  full, part = metrics._of_equal_size(A, B, seed=3)
  assert full.shape == part.shape == B.shape
  assert len(np.unique(full, axis=0)) == len(B) and {*map(bytes, full)} < {*map(bytes, A)}
  assert {*map(bytes, part)} == {*map(bytes, B)}
  np.testing.assert_allclose(mind(A, B, num_directions=50), mind(B, A, num_directions=50), rtol=0.2)
  assert mind(A, A[:30]) < mind(A + 1, A[:30])


def test_precision_and_recall_are_shares_of_balls():
  rng = np.random.default_rng(2)
  real, generated = rng.normal(size=(150, 5)) + 100, 0.5 * rng.normal(size=(90, 5)) + 100.3
  expected = []
  for inside, centres in ((generated, real), (real, generated)):
    distance, _ = sklearn.neighbors.NearestNeighbors(n_neighbors=4).fit(centres).kneighbors(centres)
    between = sklearn.metrics.pairwise.euclidean_distances(inside, centres)
    expected.append(np.mean(np.any(between <= distance[:, 3], axis=1)))
  np.testing.assert_allclose(precision_recall(generated, real), expected)
  assert expected[0] > expected[1]  # a narrow cloud inside a wide one


def test_the_nearest_rows_are_found_far_from_the_origin_too(monkeypatch):
  monkeypatch.setattr(metrics, "NEIGHBOUR_ROWS", 7)
  rng = np.random.default_rng(5)
  rows, columns = rng.normal(size=(20, 5)) + 100, rng.normal(size=(60, 5)) + 100
  rows[3] = columns[41]
  found = sklearn.neighbors.NearestNeighbors(n_neighbors=2).fit(columns)
  distance, index = found.kneighbors(rows)
  index_N, distance_N = metrics.nearest(rows, columns)
  np.testing.assert_array_equal(index_N, index[:, 0])
  np.testing.assert_allclose(distance_N, distance[:, 0], rtol=1e-4)
  assert index_N[3] == 41 and distance_N[3] == 0
  np.testing.assert_allclose(metrics.nearest_other(columns), np.median(found.kneighbors(columns)[0][:, 1]), rtol=1e-4)
  assert metrics.nearest_other(columns[[0, 0]]) == 0


def test_precision_and_recall_do_not_depend_on_the_blocks(monkeypatch):
  whole = precision_recall(A, B)
  monkeypatch.setattr(metrics, "NEIGHBOUR_ROWS", 7)
  assert precision_recall(A, B) == whole


def test_precision_and_recall_know_what_is_not_there():
  rng = np.random.default_rng(3)
  left, both = rng.normal(size=(80, 3)), np.concatenate([rng.normal(size=(80, 3)), rng.normal(size=(80, 3)) + 50])
  precision, recall = precision_recall(left, both)
  assert precision > 0.8 and 0.3 < recall < 0.5  # half of the data is never drawn
  assert precision_recall(left + 1000, both) == (0.0, 0.0)


def test_the_inception_score_counts_classes():
  sure = 50 * np.eye(10)[np.arange(200) % 10]
  np.testing.assert_allclose(inception_score(sure)[0], 10, rtol=1e-6)
  np.testing.assert_allclose(inception_score(np.ones((200, 10))), (1, 0), atol=1e-12)


@pytest.mark.parametrize(
  "a, b, text",
  [
    (np.zeros((1, 3)), np.zeros((5, 3)), r"features_a has shape \(1, 3\)"),
    (np.zeros((5, 3)), np.zeros(5), r"features_b has shape \(5,\)"),
    (
      np.zeros((5, 3)),
      np.zeros((5, 4)),
      r"3 and 4 dimensions cannot be compared \(features_a and features_b\): extract both",
    ),
    (np.full((5, 3), np.nan), np.zeros((5, 3)), "features_a: 15 of 15 values are not finite"),
    (np.zeros((5, 3)), np.random.default_rng(0).normal(size=(5, 3)), "features_a: all rows are the same.*constant"),
    (np.tile(np.arange(3.0), (7, 1)), np.eye(3), "features_a: all rows are the same.*copies of one"),
  ],
)
def test_bad_features_are_refused(a, b, text):
  with pytest.raises(ValueError, match=text):
    frechet_distance(a, b)


@pytest.mark.parametrize(
  "call, text",
  [
    (lambda: precision_recall(A[:3], B), "k = 3 must be at least 1 and less than the rows, 3 and 450"),
    (lambda: precision_recall(A, B[:, :3]), "64 and 3 dimensions"),
    (lambda: precision_recall(A * np.inf, B), "generated: 32000 of 32000"),
    (lambda: kernel_distance(A, B, subsets=0), "subsets = 0"),
    (lambda: kernel_distance(A[:1], B), "features_a has shape"),
    (lambda: mind(A, B[:, :3]), r"64 and 3 dimensions cannot be compared \(a and b\)"),
    (lambda: mind(A[:1], B), r"a has shape \(1, 64\)"),
    (lambda: mind(A, B * np.nan), "b: 28800 of 28800 values are not finite"),
    (lambda: mind(A, B, num_directions=0), "num_directions = 0 must be at least 1"),
    (lambda: mind(A, B, np.eye(64)[:, :9]), r"directions of shape \(64, 9\) .* unit vectors \[K, 64\]"),
    (lambda: mind(A, B, 2 * np.eye(64)), "norms up to 2 must be unit vectors .* divide each by its norm"),
    (lambda: mind(A, B, np.eye(64)[0]), r"directions of shape \(64,\)"),
    (lambda: mind(A, B, np.zeros((0, 64))), r"directions of shape \(0, 64\)"),
    (lambda: inception_score(A[:5], splits=10), "splits = 10 .* 5"),
  ],
)
def test_bad_numbers_are_refused(call, text):
  with pytest.raises(ValueError, match=text):
    call()
