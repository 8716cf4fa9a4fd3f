"""Distances between sets of features, in float64 numpy."""

import numpy as np


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
  """The Fréchet distance between Gaussians fitted to two sets of features.

  ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the FID of Heusel et al. 2017 when the
  features are Inception's. Symmetric, and right for covariances of any rank.

  Args:
    features_a, features_b: [N, D] and [M, D], at least two rows each.

  Raises:
    ValueError: if the shapes do not fit, or a feature is not finite.
  """
  for name, features in (("a", features_a), ("b", features_b)):
    if features.ndim != 2 or len(features) < 2:
      raise ValueError(f"features_{name} has shape {features.shape}: at least two rows [N, D] are needed")
    if not np.all(np.isfinite(features)):
      raise ValueError(f"features_{name}: {np.sum(~np.isfinite(features))} of {features.size} values are not finite")
  if features_a.shape[1] != features_b.shape[1]:
    raise ValueError(f"features of {features_a.shape[1]} and {features_b.shape[1]} dimensions cannot be compared")
  (mean_a, cov_a), (mean_b, cov_b) = (_moments(features) for features in (features_a, features_b))
  # tr (Σ₁Σ₂)^½ = Σ sqrt(eig(√Σ₁ Σ₂ √Σ₁)), a symmetric problem: no complex roots to throw away.
  root_a = _square_root(cov_a)
  cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0, None)).sum()
  return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  features = features.astype(np.float64)
  return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def _square_root(covariance: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(covariance)
  return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
