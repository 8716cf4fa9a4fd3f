"""From the features of samples to the numbers that are reported, and how sure they are."""

import math

import numpy as np

from eqm_jax.evaluation import distances
from eqm_jax.evaluation.moments import Gaussian, Moments, merge
from eqm_jax.evaluation.real import Statistics

GROUPS = 10  # of the jackknife
NEIGHBOURS = 3  # k of precision and recall, as in ADM
SPLITS = 10  # of the inception score


def scores(features: dict[str, np.ndarray], real: Statistics) -> dict[str, float]:
  """All that can be told of samples.

  Args:
    features: "pool" [N, D] and maybe "spatial" [N, S] and "logits" [N, classes], in the order of the samples.
    real: what is known of the real data.

  Returns:
    "frechet" (FID for Inception's features) and, where the features allow it, "spatial_frechet" (sFID),
    "inception_score", "kernel_distance" (KID), "precision" and "recall". `_error` is a standard error: of the
    Fréchet distances by the jackknife over GROUPS parts of the samples, of precision and recall that of a share. It
    tells how much another seed would change them, not their bias, which falls with the number of samples. `_std` is the
    deviation over SPLITS parts or over random subsets, as others report it.

  Raises:
    ValueError: if there are fewer than two samples, a feature is not finite, or all samples are the same.
  """
  found = {}
  for kind, name in (("pool", "frechet"), ("spatial", "spatial_frechet")):
    if kind in features and kind in real.gaussians:
      found[name], found[f"{name}_error"] = frechet_with_error(features[kind], real.gaussians[kind])
  if "logits" in features and len(features["logits"]) >= SPLITS:
    found["inception_score"], found["inception_score_std"] = distances.inception_score(features["logits"], SPLITS)
  pool = features["pool"]
  if real.features is not None:
    found["kernel_distance"], found["kernel_distance_std"] = distances.kernel_distance(pool, real.features)
    if min(len(pool), len(real.features)) > NEIGHBOURS:
      precision, recall = distances.precision_recall(pool, real.features, NEIGHBOURS)
      for name, share, count in (("precision", precision, len(pool)), ("recall", recall, len(real.features))):
        found[name], found[f"{name}_error"] = share, math.sqrt(share * (1 - share) / count)
  return found


def frechet_with_error(features: np.ndarray, real: Gaussian) -> tuple[float, float | None]:
  """The Fréchet distance of samples to the real data, and its standard error by the jackknife.

  Delete a group: (G−1)/G·Σ(d₋g − mean d₋g)², of the distances without each of G consecutive groups.
  With fewer than four samples there is no error, None.

  Raises:
    ValueError: if there are fewer than two samples, a value is not finite, or all samples are the same.
  """
  if len(features) < 2:
    raise ValueError(f"{len(features)} sample: a distance needs two")
  if not np.all(np.isfinite(features)):
    bad = np.sum(~np.all(np.isfinite(features), axis=1))
    raise ValueError(f"the features of {bad} of {len(features)} samples are not finite: did the samples diverge?")
  groups = [Moments.of(part) for part in np.array_split(features, min(GROUPS, len(features) // 2))]
  whole = merge(groups).gaussian
  distances.check_spread("the samples", whole)
  root = distances.square_root(real.covariance)
  distance = distances.frechet_of_gaussians(real, whole, root)
  if len(groups) < 2:
    return distance, None
  without = [
    distances.frechet_of_gaussians(real, merge(groups[:g] + groups[g + 1 :]).gaussian, root) for g in range(len(groups))
  ]
  return distance, math.sqrt((len(groups) - 1) * np.var(without))
