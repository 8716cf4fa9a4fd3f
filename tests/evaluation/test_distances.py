import numpy as np
import pytest
import scipy.linalg
from conftest import ROOT

from eqm_jax.evaluation.distances import frechet_distance

GOLDEN = np.load(ROOT / "tests" / "reference" / "distances.npz")


def test_it_agrees_with_the_fid_library():
  a, b = GOLDEN["features_a"], GOLDEN["features_b"]
  np.testing.assert_allclose(frechet_distance(a, b), GOLDEN["fid"], rtol=1e-8)
  # 40 and 30 rows of 64 features: covariances without full rank.
  np.testing.assert_allclose(frechet_distance(a[:40], b[:30]), GOLDEN["fid_small"], rtol=1e-5)


def test_it_agrees_with_the_matrix_square_root():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(200, 6)), rng.normal(size=(100, 6)) @ rng.normal(size=(6, 6)) + 1
  root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
  expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
  np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6)


def test_equal_sets_are_at_distance_zero_and_constant_ones_at_that_of_their_means():
  a = GOLDEN["features_a"]
  assert abs(frechet_distance(a, a)) < 1e-8
  np.testing.assert_allclose(frechet_distance(np.zeros((3, 4)), np.ones((5, 4))), 4.0)
  np.testing.assert_allclose(frechet_distance(np.zeros((3, 1)), np.ones((5, 1))), 1.0)


@pytest.mark.parametrize(
  "a, b, text",
  [
    (np.zeros((1, 3)), np.zeros((5, 3)), r"features_a has shape \(1, 3\)"),
    (np.zeros((5, 3)), np.zeros(5), r"features_b has shape \(5,\)"),
    (np.zeros((5, 3)), np.zeros((5, 4)), "3 and 4 dimensions"),
    (np.full((5, 3), np.nan), np.zeros((5, 3)), "features_a: 15 of 15 values are not finite"),
  ],
)
def test_bad_features_are_refused(a, b, text):
  with pytest.raises(ValueError, match=text):
    frechet_distance(a, b)
