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


@pytest.mark.parametrize("real_count", [20, 400])
@pytest.mark.parametrize("copies", [1, 2])
def test_fewer_samples_than_features_have_the_same_distances(real_count, copies):
  """By a product of rows, which is smaller, as by one of columns; copies leave it without full rank."""
  rng = np.random.default_rng(0)
  real = GaussianStatistics.of(rng.normal(size=(real_count, 50))).gaussian
  features = (rng.normal(size=(24, 50)) @ rng.normal(size=(50, 50)) + 1).repeat(copies, axis=0).astype(np.float32)
  groups = np.array_split(features, 5)
  found, expected = [], []
  for distances, way in ((found, metrics._by_rows), (expected, metrics._by_columns)):
    distance_of, parts = way(groups, real)
    distances += [distance_of(parts), *(distance_of(parts[:g] + parts[g + 1 :]) for g in range(5))]
  assert len(found) == 6
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  distance, error = metrics.frechet_with_error(features, real)
  assert distance == pytest.approx(expected[0], rel=1e-6) and error > 0
  with pytest.raises(ValueError, match="40 features of the samples, but 50 of the real data"):
    metrics.frechet_with_error(features[:, :40], real)


def test_minds_error_is_what_another_seed_would_change(real, monkeypatch):
  monkeypatch.setattr(metrics, "DIRECTIONS", 40)
  found = [metrics.mind_with_error(sample(seed, 300), real.features[:300]) for seed in range(80)]
  distances, errors = np.asarray(found).T
  assert 0.75 < np.sqrt(np.mean(errors**2)) / np.std(distances, ddof=1) < 1.33


def test_few_samples_have_no_error(real):
  assert metrics.frechet_with_error(sample(0, 3), real.gaussians["pool"])[1] is None
  with pytest.raises(ValueError, match="1 sample: a distance needs two"):
    metrics.frechet_with_error(sample(0, 1), real.gaussians["pool"])


def test_metrics_are_those_that_the_features_allow(real):
  pool = sample(0, 300)
  assert set(metrics.compute({"pool": pool}, real)) == {
    "frechet", "frechet_error", "kernel_distance", "kernel_distance_std", "mind", "mind_error", "mind_samples",
    "precision", "precision_error", "recall", "recall_error", "nearest",
  }  # fmt: skip
  assert metrics.compute({"pool": pool}, real)["mind_samples"] == 300
  without_features = ReferenceStatistics({**real.gaussians, "spatial": real.gaussians["pool"]}, None, {})
  found = metrics.compute({"pool": pool, "spatial": pool, "logits": pool}, without_features)
  assert set(found) == {
    "frechet", "frechet_error", "spatial_frechet", "spatial_frechet_error", "inception_score", "inception_score_std"
  }  # fmt: skip
  assert found["frechet"] == found["spatial_frechet"]


@pytest.mark.parametrize("count", [2, 3, 4, 11])
def test_few_samples_have_the_metrics_that_they_allow(count, caplog):
  """Compared with themselves; what is left out is said."""
  pool = sample(count, count)
  itself = ReferenceStatistics({"pool": GaussianStatistics.of(pool).gaussian}, pool, {})
  found = metrics.compute({"pool": pool, "logits": pool}, itself)
  assert found["frechet"] < 1e-3 and (found["frechet_error"] is None) == (count < 4)
  assert found["mind"] < 1e-6 and (found["mind_error"] is None) == (count < 4) and found["mind_samples"] == count
  assert np.isfinite(found["kernel_distance"]) and "kernel_distance_std" not in found, "there is one subset"
  assert (found.get("precision"), found.get("recall")) == ((1, 1) if count > 3 else (None, None))
  assert ("inception_score" in found) == (count == 11)
  said = f"{count} samples and {count} real ones: "
  assert (f"{said}too few for precision and recall, left out; 4 of each are needed" in caplog.text) == (count < 4)
  score = "the inception score over 10 groups cannot exceed 1.1" if count == 11 else "too few for an inception score"
  assert said + score in caplog.text


def test_one_real_sample_leaves_distances_of_sets_out(real, caplog):
  one = ReferenceStatistics(real.gaussians, real.features[:1], {})
  assert set(metrics.compute({"pool": sample(0, 20)}, one)) == {"frechet", "frechet_error", "nearest"}
  assert "20 samples and 1 real ones: too few for kernel distance, MIND, precision and recall" in caplog.text
  caplog.clear()
  metrics.compute({"pool": sample(0, 20)}, real)
  assert not caplog.text


def test_samples_with_copies_have_metrics(real):
  found = metrics.compute({"pool": np.tile(sample(0, 2), (6, 1))}, real)
  assert found["frechet"] > 0 and np.isfinite(found["frechet_error"]) and 0 <= found["precision"] <= 1
  with pytest.raises(ValueError, match="the samples: all rows are the same.*copies of one.*two that differ"):
    metrics.compute({"pool": np.tile(sample(0, 1), (6, 1))}, real)
