"""Distances between sets of features [N, D], by the definitions that others report.

In float64 numpy, but for the nearest neighbours, which are looked for on this process's devices in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax import devices
from eqm_jax.evaluation.moments import Gaussian, Moments

NEIGHBOUR_ROWS = 256  # whose neighbours a device looks for at a time: bounds the memory, with 50,000 columns 51 MB


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
  """The Fréchet distance between Gaussians fitted to two sets of features.

  ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the FID of Heusel et al. 2017 when the
  features are Inception's. Symmetric, and right for covariances of any rank but 0.

  Args:
    features_a, features_b: [N, D] and [M, D], at least two rows each.

  Raises:
    ValueError: if the shapes do not fit, a feature is not finite, or all rows of a set are the same.
  """
  _check(features_a=features_a, features_b=features_b)
  a, b = (Moments.of(features).gaussian for features in (features_a, features_b))
  check_spread("features_a", a)
  check_spread("features_b", b)
  return frechet_of_gaussians(a, b)


def check_spread(name: str, gaussian: Gaussian):
  """Refuses, as a ValueError, a set whose rows are all the same: its distance says nothing."""
  if not np.any(np.diagonal(gaussian.covariance)):
    raise ValueError(f"{name}: all rows are the same, their covariance is zero: are the images constant?")


def frechet_of_gaussians(a: Gaussian, b: Gaussian, root_a: np.ndarray | None = None) -> float:
  """`frechet_distance` of two Gaussians; `root_a` is `square_root(a.covariance)`, if it is at hand."""
  root_a = square_root(a.covariance) if root_a is None else root_a
  # tr (Σ₁Σ₂)^½ = Σ sqrt(eig(√Σ₁ Σ₂ √Σ₁)), a symmetric problem: no complex roots to throw away.
  cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ b.covariance @ root_a), 0, None)).sum()
  return float(np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def square_root(covariance: np.ndarray) -> np.ndarray:
  """The symmetric root of a symmetric matrix without negative eigenvalues but for rounding."""
  values, vectors = np.linalg.eigh(covariance)
  return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
  """exp E KL(p(y|x) ‖ p(y)) over consecutive parts of the samples: its mean and standard deviation.

  Salimans et al. 2016. ADM's evaluator, with parts of 5,000, gives the same mean for 50,000 samples.

  Args:
    logits: [N, classes], of Inception `logits_unbiased`.
    splits: parts, of at least one sample each.

  Raises:
    ValueError: if the shape does not fit or a value is not finite.
  """
  _check(logits=logits)
  if not 1 <= splits <= len(logits):
    raise ValueError(f"splits = {splits} must lie between 1 and the number of samples, {len(logits)}")
  shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
  scores = []
  for i in range(splits):
    part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
    p = np.exp(part)
    log_marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(float).tiny))
    scores.append(np.exp(np.mean(np.sum(p * (part - log_marginal), axis=1))))
  return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
  features_a: np.ndarray, features_b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
  """The squared maximum mean discrepancy of random subsets, unbiased: its mean and standard deviation.

  With the kernel (x·y/D + 1)³; the KID of Bińkowski et al. 2018 when the features are Inception's.

  Args:
    features_a, features_b: [N, D] and [M, D], at least two rows each.
    subsets: how many.
    subset_size: of each, drawn without replacement; where a set is smaller, its size.
    seed: of the draws.

  Raises:
    ValueError: if the shapes do not fit or a feature is not finite.
  """
  _check(features_a=features_a, features_b=features_b)
  size = min(subset_size, len(features_a), len(features_b))
  if size < 2 or subsets < 1:
    raise ValueError(f"subsets = {subsets} must be at least 1 and subset_size = {subset_size} at least 2")
  rng, found = np.random.default_rng(seed), []
  for _ in range(subsets):
    a, b = (
      features[rng.choice(len(features), size, replace=False)].astype(np.float64)
      for features in (features_a, features_b)
    )
    within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (_cubic_kernel(a, a), _cubic_kernel(b, b)))
    found.append(within - 2 * _cubic_kernel(a, b).mean())
  return float(np.mean(found)), float(np.std(found))


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
  """Improved precision and recall (Kynkäänniemi et al. 2019).

  Precision is the share of generated features that lie in the real manifold: in the ball of some real feature whose
  radius is the distance to its k-th nearest real neighbour. Recall is the same with the sets exchanged.

  Args:
    generated, real: [N, D] and [M, D], more than k rows each. Takes time N² + M² + 2·N·M, and the memory of the
      features and of a few hundred rows of distances.

  Raises:
    ValueError: if the shapes do not fit or a feature is not finite.
  """
  _check(generated=generated, real=real)
  if not 1 <= k < min(len(generated), len(real)):
    raise ValueError(f"k = {k} must be at least 1 and less than the rows, {len(generated)} and {len(real)}")
  centre = real.mean(axis=0, dtype=np.float64)  # distances from inner products lose digits far from the origin
  generated, real = ((features - centre).astype(np.float32) for features in (generated, real))
  return _covered(generated, real, _radii(real, k)), _covered(real, generated, _radii(generated, k))


def _radii(features: np.ndarray, k: int) -> np.ndarray:
  """The squared distance of each row to its k-th nearest other row, [N]."""
  columns = devices.replicate(features)
  return devices.in_batches(functools.partial(_kth_nearest, columns, k=k), features, NEIGHBOUR_ROWS)


def _covered(rows: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
  """The share of rows in the ball of at least one centre."""
  columns, radii = devices.replicate((centres, radii))
  return float(np.mean(devices.in_batches(functools.partial(_is_covered, columns, radii), rows, NEIGHBOUR_ROWS)))


@functools.partial(jax.jit, static_argnames="k")
def _kth_nearest(columns: jax.Array, rows: jax.Array, k: int) -> jax.Array:
  squared = _squared_distances(rows, columns)
  # The nearest, the row itself, is taken out, then k − 1 more: for so few, lax.top_k is six times slower on a CPU.
  for _ in range(k):
    nearest = jnp.argmin(squared, axis=1)
    squared = jnp.where(jnp.arange(len(columns)) == nearest[:, None], jnp.inf, squared)
  return jnp.maximum(jnp.min(squared, axis=1), 0)


@jax.jit
def _is_covered(columns: jax.Array, radii: jax.Array, rows: jax.Array) -> jax.Array:
  return jnp.any(_squared_distances(rows, columns) <= radii, axis=1)


def _squared_distances(rows: jax.Array, columns: jax.Array) -> jax.Array:
  cross = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
  return jnp.sum(rows**2, axis=1)[:, None] + jnp.sum(columns**2, axis=1) - 2 * cross


def _cubic_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  kernel = a @ b.T / a.shape[1] + 1
  return kernel * kernel * kernel  # NumPy's power takes many times as long


def _check(**sets: np.ndarray):
  for name, features in sets.items():
    if features.ndim != 2 or len(features) < 2:
      raise ValueError(f"{name} has shape {features.shape}: at least two rows [N, D] are needed")
    if not np.all(np.isfinite(features)):
      raise ValueError(f"{name}: {np.sum(~np.isfinite(features))} of {features.size} values are not finite")
  sizes = [features.shape[1] for features in sets.values()]
  if len(set(sizes)) > 1:
    raise ValueError(f"features of {sizes[0]} and {sizes[1]} dimensions cannot be compared")
