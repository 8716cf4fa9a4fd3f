"""How long the scores take, and how much memory: python -m eqm_jax.evaluation.benchmark [--samples=50000]

Random features of the sizes of Inception's pool and logits (sFID is as large) stand for samples and for the real data.
"""

import argparse
import resource
import time

import numpy as np

from eqm_jax.evaluation import distances, scores
from eqm_jax.evaluation.moments import Moments

POOL, CLASSES = 2048, 1008


def main():
  """Prints a Markdown table; the peak is that of the process so far, in its order."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--samples", type=int, default=50_000)
  parser.add_argument("--real", type=int, default=10_000, help="real features, as many as ADM's file has images")
  options = parser.parse_args()
  rng = np.random.default_rng(0)

  def features(count: int, size: int) -> np.ndarray:
    return rng.standard_normal((count, size), dtype=np.float32) * np.linspace(0.1, 2, size, dtype=np.float32)

  pool, real = features(options.samples, POOL), features(options.real, POOL)
  gaussian = Moments.of(real).gaussian
  print(f"{options.samples} samples, {options.real} real ones; {_peak():.2f} GiB to begin with\n")
  print("| what | seconds | peak GiB |\n|---|---|---|")
  _time("mean and covariance, 2,048", lambda: Moments.of(pool))
  _time("Fréchet distance, 2,048", lambda: distances.frechet_of_gaussians(gaussian, gaussian))
  _time("Fréchet distance and its jackknife, 2,048", lambda: scores.frechet_with_error(pool, gaussian))
  _time("kernel distance", lambda: distances.kernel_distance(pool, real))
  _time("precision and recall", lambda: distances.precision_recall(pool, real))
  logits = features(options.samples, CLASSES)
  _time("inception score", lambda: distances.inception_score(logits))


def _time(name: str, function):
  begin = time.monotonic()
  function()
  print(f"| {name} | {time.monotonic() - begin:.1f} | {_peak():.2f} |", flush=True)


def _peak() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
  main()
