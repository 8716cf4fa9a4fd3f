import numpy as np

from eqm_jax.evaluation.metrics import GaussianStatistics, merge


def test_fifty_thousand_features_far_from_zero_agree_with_numpy():
  """A mean 10,000 times the spread, in float32: Σ x xᵀ − N·mean·meanᵀ would have nothing left."""
  rng = np.random.default_rng(0)
  features = (rng.normal(size=(50_000, 24)) @ rng.normal(size=(24, 24)) + 1e4).astype(np.float32)
  parts = merge(GaussianStatistics.of(part) for part in np.array_split(features, [10, 7000, 31_001]))
  exact = features.astype(np.float64)
  np.testing.assert_allclose(parts.mean, exact.mean(axis=0), rtol=1e-13)
  np.testing.assert_allclose(parts.gaussian.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)
  assert parts.count == 50_000
  naive = features.T @ features / 50_000 - np.outer(features.mean(0), features.mean(0))
  assert np.max(np.abs(naive - np.cov(exact, rowvar=False))) > 0.1, "the test should be hard"


def test_the_order_of_merging_does_not_matter():
  features = np.random.default_rng(1).normal(size=(90, 5)) + 100
  parts = [GaussianStatistics.of(part) for part in np.array_split(features, 7)]
  one, other = merge(parts), merge([merge(parts[4:]), merge(parts[:4])])
  np.testing.assert_allclose(one.scatter, other.scatter, rtol=1e-12)
  np.testing.assert_allclose(one.mean, other.mean, rtol=1e-14)
  nothing = GaussianStatistics(0, np.zeros(5), np.zeros((5, 5)))
  assert merge([nothing, nothing]).count == 0
  np.testing.assert_array_equal(merge([nothing, parts[0], nothing]).scatter, parts[0].scatter)
