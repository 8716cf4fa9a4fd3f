"""Mean and covariance of any number of features, part by part, in float64."""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

ROWS = 4096  # that are taken to float64 at a time


@dataclasses.dataclass(frozen=True)
class Moments:
  """Count, mean and scatter Σ (x − mean)(x − mean)ᵀ.

  Parts are merged by the difference of their means (Chan, Golub and LeVeque 1979), so that nothing is lost where
  the mean is large and the spread small, as with Σ x xᵀ − N·mean·meanᵀ.
  """

  count: int
  mean: np.ndarray  # [D] float64
  scatter: np.ndarray  # [D, D] float64

  @classmethod
  def of(cls, features: np.ndarray) -> "Moments":
    """Of features [N, D], N at least 1."""
    return merge(cls._of_part(features[first : first + ROWS]) for first in range(0, len(features), ROWS))

  @classmethod
  def _of_part(cls, features: np.ndarray) -> "Moments":
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return cls(len(features), mean, centred.T @ centred)

  @property
  def gaussian(self) -> "Gaussian":
    """With the unbiased estimate of the covariance; count must be at least 2."""
    return Gaussian(self.mean, self.scatter / (self.count - 1))


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """What the Fréchet distance knows of a set of features."""

  mean: np.ndarray  # [D] float64
  covariance: np.ndarray  # [D, D] float64


def merge(parts: Iterable[Moments]) -> Moments:
  """The moments of all parts together."""
  return functools.reduce(_merge_two, parts)


def _merge_two(a: Moments, b: Moments) -> Moments:
  if not a.count or not b.count:  # a process without a share has nothing to add
    return a if a.count else b
  count, difference = a.count + b.count, b.mean - a.mean
  mean = a.mean + difference * (b.count / count)
  scatter = a.scatter + b.scatter + np.outer(difference, difference) * (a.count * b.count / count)
  return Moments(count, mean, scatter)
