import numpy as np
import pytest

from eqm_jax.evaluation import metrics
from eqm_jax.evaluation.metrics import GaussianStatistics, ReferenceStatistics


def sample(seed: int, count: int, shift: float = 0.3) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(count, 4)) + shift


@pytest.fixture
def real():
  features = sample(1000, 4000, shift=0.0)
  return ReferenceStatistics({"pool": GaussianStatistics.of(features).gaussian}, features[:400], {})


def test_the_error_is_what_another_seed_would_change(real):
  """The jackknife's error of one set of samples, against the spread of the distances of many."""
  found = [metrics.frechet_with_error(sample(seed, 500), real.gaussians["pool"]) for seed in range(60)]
  distances, errors = np.asarray(found).T
  assert 0.8 < np.sqrt(np.mean(errors**2)) / np.std(distances, ddof=1) < 1.25


def test_few_samples_have_no_error(real):
  assert metrics.frechet_with_error(sample(0, 3), real.gaussians["pool"])[1] is None
  with pytest.raises(ValueError, match="1 sample: a distance needs two"):
    metrics.frechet_with_error(sample(0, 1), real.gaussians["pool"])


def test_metrics_are_those_that_the_features_allow(real):
  pool = sample(0, 300)
  assert set(metrics.compute({"pool": pool}, real)) == {
    "frechet", "frechet_error", "kernel_distance", "kernel_distance_std", "precision", "precision_error", "recall",
    "recall_error",
  }  # fmt: skip
  without_features = ReferenceStatistics({**real.gaussians, "spatial": real.gaussians["pool"]}, None, {})
  found = metrics.compute({"pool": pool, "spatial": pool, "logits": pool}, without_features)
  assert set(found) == {
    "frechet", "frechet_error", "spatial_frechet", "spatial_frechet_error", "inception_score", "inception_score_std"
  }  # fmt: skip
  assert found["frechet"] == found["spatial_frechet"]
