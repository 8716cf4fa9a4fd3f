"""Metrics of features [N, D] by their published definitions: FID, inception score, KID, MIND, precision and recall.

Computed in float64 numpy, except nearest neighbours, which this process's devices find in float32.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax import distributed
from eqm_jax.checks import at_least

CAST_ROWS = 4096  # rows that are cast to float64 at a time
NEIGHBOUR_ROWS = 256  # rows whose neighbours a device finds at a time: 51 MB with 50,000 columns
KINDS = ("pool", "spatial")  # of features that have Gaussian statistics
JACKKNIFE_GROUPS = 10
NEIGHBOURS = 3  # k of precision and recall, as in ADM
NEAREST_ROWS = 1000  # rows whose nearest real neighbour is looked for: enough for a median
SPLITS = 10  # of the inception score
SUBSET_SIZE = 1000  # of the kernel distance
DIRECTIONS = 1000  # M of MIND
DIRECTIONS_AT_ONCE = 64  # in memory, with the projections of all rows: 150 MB with 50,000 rows
# Rounding of a float32 |x|² + |y|² − 2x·y, relative to |x|² + |y|². Measured up to 31 for x = y of any length.
ROUNDING = 128 * float(np.finfo(np.float32).eps)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """The Gaussian that the Fréchet distance fits to a set of features."""

  mean: np.ndarray  # [D] float64
  covariance: np.ndarray  # [D, D] float64

  @functools.cached_property
  def factor(self) -> np.ndarray:
    """A matrix F [D, rank] with FFᵀ = covariance."""
    values, vectors = np.linalg.eigh(self.covariance)
    kept = _not_rounding(values)
    return vectors[:, kept] * np.sqrt(values[kept])


@dataclasses.dataclass(frozen=True)
class GaussianStatistics:
  """Count, mean and scatter Σ (x − mean)(x − mean)ᵀ of features.

  Statistics of parts are merged by the difference of their means (Chan, Golub and LeVeque 1979), which keeps all digits
  where the mean is large and the spread small; Σ x xᵀ − N·mean·meanᵀ does not.
  """

  count: int
  mean: np.ndarray  # [D] float64
  scatter: np.ndarray  # [D, D] float64

  @classmethod
  def of(cls, features: np.ndarray) -> "GaussianStatistics":
    """Statistics of features [N, D], N at least 1."""
    starts = range(0, len(features), CAST_ROWS)
    return merge(cls._of_part(features[first : first + CAST_ROWS]) for first in starts)

  @classmethod
  def _of_part(cls, features: np.ndarray) -> "GaussianStatistics":
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return cls(len(features), mean, centred.T @ centred)

  @property
  def gaussian(self) -> Gaussian:
    """The Gaussian with the unbiased estimate of the covariance; the count must be at least 2."""
    return Gaussian(self.mean, self.scatter / (self.count - 1))


def merge(parts: Iterable[GaussianStatistics]) -> GaussianStatistics:
  """Statistics of all parts together."""
  return functools.reduce(_merge_two, parts)


def _merge_two(a: GaussianStatistics, b: GaussianStatistics) -> GaussianStatistics:
  if not a.count or not b.count:  # a process without a share has nothing to add
    return a if a.count else b
  count, difference = a.count + b.count, b.mean - a.mean
  mean = a.mean + difference * (b.count / count)
  scatter = a.scatter + b.scatter + np.outer(difference, difference) * (a.count * b.count / count)
  return GaussianStatistics(count, mean, scatter)


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
  """Features of the real data, reduced to what the metrics need."""

  gaussians: dict[str, Gaussian]  # by kind: "pool", and maybe "spatial"
  features: np.ndarray | None  # "pool" features of some samples, [M, D]; None: not stored in the file
  origin: dict[str, Any]  # where they come from


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
  """Fréchet distance between Gaussians fitted to two sets of features.

  ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the FID of Heusel et al. 2017 for features of
  Inception. Symmetric, and exact for covariances of any rank above 0: few samples, duplicates, constant features.

  Args:
    features_a, features_b: [N, D] and [M, D], at least two rows each.

  Raises:
    ValueError: if the shapes do not fit, a feature is not finite, or all rows of a set are the same.
  """
  _check(features_a=features_a, features_b=features_b)
  a, b = (GaussianStatistics.of(features).gaussian for features in (features_a, features_b))
  check_spread("features_a", np.diagonal(a.covariance))
  check_spread("features_b", np.diagonal(b.covariance))
  return frechet_of_gaussians(a, b)


def check_spread(name: str, spread_D: np.ndarray):
  """Raises ValueError for a set whose rows are all the same, since its distance means nothing."""
  if not np.any(spread_D):
    raise ValueError(
      f"{name}: all rows are the same, their covariance is zero: are the images constant, or copies of one? A distance "
      "needs two that differ"
    )


def frechet_of_gaussians(a: Gaussian, b: Gaussian) -> float:
  """Fréchet distance of two Gaussians."""
  # tr (Σ₁Σ₂)^½ = Σ sqrt(eig(FᵀΣ₂F)) with Σ₁ = FFᵀ is a symmetric problem, so no complex roots have to be discarded.
  # It has as many eigenvalues as Σ₁ has rank: the square roots of others, zero but for rounding, would add up.
  cross = np.sqrt(np.clip(np.linalg.eigvalsh(a.factor.T @ b.covariance @ a.factor), 0, None)).sum()
  distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
  return max(0.0, float(distance))


def _not_rounding(eigenvalues: np.ndarray) -> np.ndarray:
  """Which eigenvalues of a covariance, in ascending order, are not zero to rounding."""
  return eigenvalues > eigenvalues[-1] * len(eigenvalues) * np.finfo(float).eps


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
  """Inception score, exp E KL(p(y|x) ‖ p(y)): mean and standard deviation over consecutive splits of the samples.

  Salimans et al. 2016. ADM's evaluator, with parts of 5,000, gives the same mean for 50,000 samples.

  Args:
    logits: [N, classes], of Inception `logits_unbiased`.
    splits: number of splits, of at least one sample each.

  Raises:
    ValueError: if the shape does not fit or a value is not finite.
  """
  _check(logits=logits)
  if not 1 <= splits <= len(logits):
    raise ValueError(f"splits = {splits} must lie between 1 and the number of samples, {len(logits)}: give fewer")
  shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
  values = []
  for i in range(splits):
    part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
    p = np.exp(part)
    log_marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(float).tiny))
    values.append(np.exp(np.mean(np.sum(p * (part - log_marginal), axis=1))))
  return float(np.mean(values)), float(np.std(values))


def kernel_distance(
  features_a: np.ndarray, features_b: np.ndarray, *, subsets: int = 100, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
  """Kernel distance: mean and standard deviation over random subsets of the unbiased squared MMD.

  The kernel is (x·y/D + 1)³; for features of Inception this is the KID of Bińkowski et al. 2018.

  Args:
    features_a, features_b: [N, D] and [M, D], at least two rows each.
    subsets: number of subsets.
    subset_size: samples in a subset, drawn without replacement; at most the size of the smaller set. Where it is the
      size of both, there is one subset, and no deviation.
    seed: of the subsets.

  Raises:
    ValueError: if the shapes do not fit or a feature is not finite.
  """
  _check(features_a=features_a, features_b=features_b)
  size = min(subset_size, len(features_a), len(features_b))
  if size < 2 or subsets < 1:
    raise ValueError(f"subsets = {subsets} must be at least 1 and subset_size = {subset_size} at least 2: give more")
  rng, values = np.random.default_rng(seed), []
  for _ in range(subsets if size < max(len(features_a), len(features_b)) else 1):
    a, b = (
      features[rng.choice(len(features), size, replace=False)].astype(np.float64)
      for features in (features_a, features_b)
    )
    within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (_cubic_kernel(a, a), _cubic_kernel(b, b)))
    values.append(within - 2 * _cubic_kernel(a, b).mean())
  return float(np.mean(values)), float(np.std(values))


def mind(
  a: np.ndarray,
  b: np.ndarray,
  directions: np.ndarray | None = None,
  *,
  num_directions: int = DIRECTIONS,
  seed: int = 0,
) -> float:
  """Monge Inception Distance of two sets of features (Berthet et al. 2026, arXiv 2605.06797).

  3D·mean (sort(Xu)_j − sort(Yu)_j)² over directions u and ranks j: a sliced Wasserstein distance, scaled so that a
  shift by v costs about 3‖v‖². It compares whole distributions, where the Fréchet distance compares means and
  covariances. It is larger for fewer rows, so only values of the same number of rows are comparable. Symmetric for
  sets of equal size.

  Args:
    a, b: [N, D] and [M, D], at least two rows each. Of the larger set as many rows as the smaller one has are drawn
      without replacement, so the value is of min(N, M) rows.
    directions: unit vectors [K, D]; None: `num_directions` random ones.
    num_directions: number of directions drawn, where none are given.
    seed: of the directions and of the rows; the same for all sets that are compared.

  Raises:
    ValueError: if the shapes do not fit, a feature is not finite, or a direction is no unit vector.
  """
  _check(a=a, b=b)
  if directions is None:
    directions = _random_directions(num_directions, a.shape[1], seed)
  norms = np.linalg.norm(directions, axis=-1)
  if directions.shape != (max(1, len(directions)), a.shape[1]) or not np.allclose(norms, 1, atol=1e-3):
    raise ValueError(
      f"directions of shape {directions.shape} and norms up to {np.max(norms, initial=0):.4g} must be unit vectors "
      f"[K, {a.shape[1]}], one number for each feature: divide each by its norm"
    )
  return float(_sliced_distances(*_of_equal_size(a, b, seed), directions, 0)[0])


def mind_with_error(samples: np.ndarray, real: np.ndarray, seed: int = 0) -> tuple[float, float | None]:
  """`mind` of samples and real data, and its standard error by the delete-a-group jackknife of `frechet_with_error`.

  Without a group, the other samples are compared with as many real rows, the same for all groups: the error is that of
  the samples. None with fewer than four rows.
  """
  _check(samples=samples, real=real)
  samples, real = _of_equal_size(samples, real, seed)
  groups = min(JACKKNIFE_GROUPS, len(samples) // 2)
  directions = _random_directions(DIRECTIONS, samples.shape[1], seed)
  distance, *without = _sliced_distances(samples, real, directions, groups if groups > 1 else 0)
  return float(distance), _jackknife_error(without) if without else None


def _random_directions(count: int, size: int, seed: int) -> np.ndarray:
  """Unit vectors [count, size], uniform on the sphere."""
  at_least("num_directions", count, 1)
  directions = np.random.default_rng(seed).standard_normal((count, size))
  return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _of_equal_size(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """As many rows of both sets, in random order."""
  count = min(len(a), len(b))
  return tuple(
    features[np.random.default_rng([seed, i]).choice(len(features), count, replace=False)]
    for i, features in enumerate((a, b))
  )


def _sliced_distances(a: np.ndarray, b: np.ndarray, directions: np.ndarray, groups: int) -> np.ndarray:
  """3D·mean (sort(au)_j − sort(bu)_j)² for sets of equal size, [1 + groups].

  The first is of all rows. Each other one is without one of so many groups of `a`, and without the last rows of `b`.
  """
  count, size = a.shape
  group_N = np.arange(count) * groups // count
  means = []
  for first in range(0, len(directions), DIRECTIONS_AT_ONCE):
    part = directions[first : first + DIRECTIONS_AT_ONCE]
    (sorted_a, order_a), (sorted_b, order_b) = (_sorted_projections(features, part) for features in (a, b))
    means.append([np.mean((sorted_a - sorted_b) ** 2, axis=1)])
    for group in range(groups):
      kept_a = sorted_a[group_N[order_a] != group].reshape(len(part), -1)  # sorted, too
      kept_b = sorted_b[order_b < kept_a.shape[1]].reshape(len(part), -1)
      means[-1].append(np.mean((kept_a - kept_b) ** 2, axis=1))
  return 3 * size * np.concatenate(means, axis=1).mean(axis=1)


def _sorted_projections(features: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Projections of all rows on each direction in ascending order, float64, and the rows that they are of, [K, N]."""
  starts = range(0, len(features), CAST_ROWS)
  parts = [directions @ features[first : first + CAST_ROWS].astype(np.float64).T for first in starts]
  projected = np.concatenate(parts, axis=1)
  order = np.argsort(projected, axis=1)
  return np.take_along_axis(projected, order, axis=1), order


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
  """Improved precision and recall (Kynkäänniemi et al. 2019).

  Precision is the fraction of generated features inside the real manifold, the balls around real features with the
  distance to the k-th nearest real neighbour as radius. Recall exchanges the two sets. Both are 1 for a set and itself,
  copies included: distances within rounding of zero are zero.

  Args:
    generated, real: [N, D] and [M, D], more than k rows each. Time grows with N² + M² + 2·N·M; memory is that of the
      features and of a few hundred rows of distances.
    k: neighbours.

  Raises:
    ValueError: if the shapes do not fit or a feature is not finite.
  """
  _check(generated=generated, real=real)
  if not 1 <= k < min(len(generated), len(real)):
    raise ValueError(
      f"k = {k} must be at least 1 and less than the rows, {len(generated)} and {len(real)}: give more samples"
    )
  centre = real.mean(axis=0, dtype=np.float64)  # distances from inner products lose digits far from the origin
  generated, real = ((features - centre).astype(np.float32) for features in (generated, real))
  return _covered(generated, real, _radii(real, k)), _covered(real, generated, _radii(generated, k))


def _radii(features: np.ndarray, k: int) -> np.ndarray:
  """Squared distance of each row to its k-th nearest other row, [N]."""
  columns = distributed.replicate(features)
  return distributed.in_batches(functools.partial(_kth_nearest, columns, k=k), features, NEIGHBOUR_ROWS)


def _covered(rows: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
  """Fraction of rows inside the ball of at least one centre."""
  columns, radii = distributed.replicate((centres, radii))
  return float(np.mean(distributed.in_batches(functools.partial(_is_covered, columns, radii), rows, NEIGHBOUR_ROWS)))


def nearest(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Number of the nearest of `columns` [M, D] to each of `rows` [N, D], and its distance: [N] each."""
  centre = columns.mean(axis=0, dtype=np.float64)
  rows, columns = ((features - centre).astype(np.float32) for features in (rows, columns))
  find = functools.partial(_nearest, distributed.replicate(columns))
  index_N, squared_N = distributed.in_batches(find, rows, NEIGHBOUR_ROWS)
  return index_N, np.sqrt(squared_N)


def nearest_other(features: np.ndarray) -> float:
  """Median distance of features [N, D], N at least 2, to their nearest other row; of NEAREST_ROWS rows at most."""
  features = (features - features.mean(axis=0, dtype=np.float64)).astype(np.float32)
  rows = features[np.linspace(0, len(features) - 1, min(NEAREST_ROWS, len(features))).astype(int)]
  find = functools.partial(_kth_nearest, distributed.replicate(features), k=1)
  return float(np.median(np.sqrt(distributed.in_batches(find, rows, NEIGHBOUR_ROWS))))


@jax.jit
def _nearest(columns: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  squared = _squared_distances(rows, columns)
  return jnp.argmin(squared, axis=1), jnp.min(squared, axis=1)


@functools.partial(jax.jit, static_argnames="k")
def _kth_nearest(columns: jax.Array, rows: jax.Array, k: int) -> jax.Array:
  squared = _squared_distances(rows, columns)
  # The nearest row is the row itself; it and k − 1 more are removed. lax.top_k is six times slower on a CPU here.
  for _ in range(k):
    nearest = jnp.argmin(squared, axis=1)
    squared = jnp.where(jnp.arange(len(columns)) == nearest[:, None], jnp.inf, squared)
  return jnp.min(squared, axis=1)


@jax.jit
def _is_covered(columns: jax.Array, radii: jax.Array, rows: jax.Array) -> jax.Array:
  return jnp.any(_squared_distances(rows, columns) <= radii, axis=1)


def _squared_distances(rows: jax.Array, columns: jax.Array) -> jax.Array:
  cross = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
  scale = jnp.sum(rows**2, axis=1)[:, None] + jnp.sum(columns**2, axis=1)
  squared = scale - 2 * cross
  return jnp.where(squared > ROUNDING * scale, squared, 0)  # a row and its copy


def _cubic_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  kernel = a @ b.T / a.shape[1] + 1
  return kernel * kernel * kernel  # faster than NumPy's power


def _check(**sets: np.ndarray):
  for name, features in sets.items():
    if features.ndim != 2 or len(features) < 2:
      raise ValueError(f"{name} has shape {features.shape}: at least two rows [N, D] are needed")
    if not np.all(np.isfinite(features)):
      raise ValueError(f"{name}: {np.sum(~np.isfinite(features))} of {features.size} values are not finite")
  sizes = [features.shape[1] for features in sets.values()]
  if len(set(sizes)) > 1:
    raise ValueError(
      f"features of {sizes[0]} and {sizes[1]} dimensions cannot be compared ({' and '.join(sets)}): extract both with "
      "the same network"
    )


def compute(features: dict[str, np.ndarray], reference: ReferenceStatistics) -> dict[str, float]:
  """All metrics of a sample set that its features allow.

  Args:
    features: "pool" [N, D] and maybe "spatial" [N, S] and "logits" [N, classes], in the order of the samples.
    reference: statistics of the real data.

  Returns:
    "frechet" (FID for Inception's features) and, where the features allow it, "spatial_frechet" (sFID),
    "inception_score", "kernel_distance" (KID), "mind" of "mind_samples" rows of each set, "precision", "recall" and
    "nearest", the median distance of the first NEAREST_ROWS samples to their nearest real ones. `_error` is a standard
    error: of the Fréchet distances and MIND by the jackknife over JACKKNIFE_GROUPS groups of samples, of precision and
    recall that of a fraction. It estimates how much another seed would change the metric, not the bias, which falls
    with the number of samples. `_std` is the deviation over splits or over random subsets, as published numbers have
    it. What needs more samples than there are is left out, with a line in the log.

  Raises:
    ValueError: if there are fewer than two samples, a feature is not finite, or all samples are the same.
  """
  metrics, pool, real = {}, features["pool"], reference.features
  for kind, name in (("pool", "frechet"), ("spatial", "spatial_frechet")):
    if kind in features and kind in reference.gaussians:
      metrics[name], metrics[f"{name}_error"] = frechet_with_error(features[kind], reference.gaussians[kind])
  if "logits" in features and len(pool) >= SPLITS:
    metrics["inception_score"], metrics["inception_score_std"] = inception_score(features["logits"], SPLITS)
  if real is not None and len(real) >= 2:
    metrics["kernel_distance"], deviation = kernel_distance(pool, real)
    if max(len(pool), len(real)) > min(len(pool), len(real), SUBSET_SIZE):  # otherwise there is but one subset
      metrics["kernel_distance_std"] = deviation
    metrics["mind"], metrics["mind_error"] = mind_with_error(pool, real)
    metrics["mind_samples"] = min(len(pool), len(real))
  if real is not None and min(len(pool), len(real)) > NEIGHBOURS:
    precision, recall = precision_recall(pool, real, NEIGHBOURS)
    for name, fraction, count in (("precision", precision, len(pool)), ("recall", recall, len(real))):
      metrics[name] = fraction
      metrics[f"{name}_error"] = math.sqrt(fraction * (1 - fraction) / count)
  if real is not None:
    metrics["nearest"] = float(np.median(nearest(pool[:NEAREST_ROWS], real)[1]))
  _log_too_few(len(pool), None if real is None else len(real), "logits" in features)
  return metrics


def _log_too_few(count: int, real: int | None, has_logits: bool):
  """Warns of metrics that are left out, or mean little, for the numbers of samples."""
  samples = f"{count} samples" + (f" and {real} real ones" if real is not None else "")
  fewest = count if real is None else min(count, real)
  if real is not None and fewest <= NEIGHBOURS:
    left_out = "precision and recall" if fewest > 1 else "kernel distance, MIND, precision and recall"
    log.warning("%s: too few for %s, left out; %d of each are needed", samples, left_out, NEIGHBOURS + 1)
  if has_logits and count < SPLITS:
    log.warning("%s: too few for an inception score over %d groups, left out", samples, SPLITS)
  elif has_logits and count < SPLITS**2:
    log.warning("%s: the inception score over %d groups cannot exceed %g", samples, SPLITS, count / SPLITS)


def frechet_with_error(features: np.ndarray, real: Gaussian) -> tuple[float, float | None]:
  """Fréchet distance of samples to the real data, and its standard error by the delete-a-group jackknife.

  The squared error is (G−1)/G·Σ(d₋g − mean d₋g)² over the distances d₋g without one of G consecutive groups; None with
  fewer than four samples.

  Raises:
    ValueError: if there are fewer than two samples, a value is not finite, all are the same, or the sizes differ.
  """
  if len(features) < 2:
    raise ValueError(f"{len(features)} sample: a distance needs two, give more")
  if not np.all(np.isfinite(features)):
    bad = np.sum(~np.all(np.isfinite(features), axis=1))
    raise ValueError(f"the features of {bad} of {len(features)} samples are not finite: did the samples diverge?")
  if features.shape[1] != len(real.mean):
    raise ValueError(
      f"{features.shape[1]} features of the samples, but {len(real.mean)} of the real data: give the same"
    )
  check_spread("the samples", np.ptp(features, axis=0))
  groups = np.array_split(features, min(JACKKNIFE_GROUPS, len(features) // 2))
  distance_of, parts = _by_rows(groups, real) if len(features) < features.shape[1] else _by_columns(groups, real)
  distance = distance_of(parts)
  if len(parts) < 2:
    return distance, None
  return distance, _jackknife_error([distance_of(parts[:g] + parts[g + 1 :]) for g in range(len(parts))])


def _by_columns(groups: list[np.ndarray], real: Gaussian) -> tuple[Callable[[list], float], list[GaussianStatistics]]:
  """A function from parts to the Fréchet distance, by a D×D eigenvalue problem, and the part of each group."""
  return lambda parts: frechet_of_gaussians(real, merge(parts).gaussian), [*map(GaussianStatistics.of, groups)]


def _by_rows(groups: list[np.ndarray], real: Gaussian) -> tuple[Callable[[list], float], list[tuple]]:
  """The same by an N×N eigenvalue problem, which is the smaller one for fewer samples N than features D.

  With Σ₁ = FFᵀ of the real data, and Σ₂ = XᵀX of N centred samples, FᵀΣ₂F and XF(XF)ᵀ have the same eigenvalues.
  """

  def distance_of(parts: list[tuple]) -> float:
    x, y = map(np.concatenate, zip(*parts))
    mean, y = x.mean(axis=0), y - y.mean(axis=0)
    values = np.linalg.eigvalsh(y @ y.T / (len(x) - 1))
    cross = np.sqrt(values[_not_rounding(values)]).sum()
    trace = np.trace(real.covariance) + np.sum((x - mean) ** 2) / (len(x) - 1)
    return max(0.0, float(np.sum((real.mean - mean) ** 2) + trace - 2 * cross))

  return distance_of, [(group, group @ real.factor) for group in (group.astype(np.float64) for group in groups)]


def _jackknife_error(without: list[float]) -> float:
  """Standard error of a metric from its values without each of the groups in turn."""
  return math.sqrt((len(without) - 1) * np.var(without))
