"""Out-of-distribution detection: kinds of outliers, scores of an image, and the AUROC between them.

Outliers are made of noise or of the data itself; in pixels all lie in [−1, 1].
"""

from collections.abc import Callable

import jax
import numpy as np
from PIL import Image

from eqm_jax import distributed
from eqm_jax.checks import one_of
from eqm_jax.data import samples
from eqm_jax.equilibrium import energy as energy_lib
from eqm_jax.equilibrium import tasks
from eqm_jax.evaluation.reference_data import MAX_FEATURES
from eqm_jax.sampling.generator import Generator

PATCH = 64  # side of the patch of a photograph that becomes one image, in pixels
SCORES = ("norm", "energy", "mahalanobis")

Score = Callable[[np.ndarray], np.ndarray]  # images [N, H, W, C] → [N], larger for outliers


def make_score(name: str, generator: Generator, source: samples.Source) -> Score:
  """Score of images, by its name.

  "norm" is ‖f(x)‖ and "energy" E(x), both without a class; "mahalanobis", the baseline
  without a network, is the distance to a Gaussian with shrunk covariance, fitted to evenly
  spaced samples of `source`.

  Raises:
    ValueError: for an unknown name, or a model that does not have the score.
  """
  one_of("tasks.ood.scores", name, SCORES)
  if name == "mahalanobis":
    return _mahalanobis(source)
  model = generator.model
  if model.time_input:
    raise ValueError(
      f"tasks.ood.scores: {name!r} needs a field without time input, but the model has model.time_input = True: "
      "use 'mahalanobis', or another model"
    )
  if name == "energy":
    params = distributed.replicate(generator.params)
    energy_lib.check_form(model, None)

    def values(x, label):
      return _energies(energy_lib.energy(model, params, label), x)
  else:
    field = generator.field()

    def values(x, label):
      return tasks.field_norm(field.bind(label), x)

  def score(images_N):
    def batch_values(index):
      null_label = np.full(len(index), model.num_classes, np.int32)
      return values(*generator.shard((images_N[index], null_label)))

    return generator.in_batches(name, batch_values, len(images_N))

  return score


def auroc(inside_N: np.ndarray, outside_N: np.ndarray) -> float:
  """Probability that an outlier scores above an image of the data."""
  import sklearn.metrics

  scores = np.concatenate([inside_N, outside_N])
  if not np.all(np.isfinite(scores)):
    raise ValueError(f"{np.sum(~np.isfinite(scores))} of {len(scores)} scores are not finite: does the model diverge?")
  is_outlier = np.concatenate([np.zeros(len(inside_N)), np.ones(len(outside_N))])
  return float(sklearn.metrics.roc_auc_score(is_outlier, scores))


def _mahalanobis(source: samples.Source) -> Score:
  import sklearn.covariance

  real_N = samples.arrays(source, samples.spread(source, MAX_FEATURES))
  if not np.any(np.ptp(real_N, axis=0)):
    raise ValueError(
      f"tasks.ood.scores: 'mahalanobis' needs images that differ, but data.source has {len(source)}, all the same: use "
      "'norm', or give more"
    )
  gaussian = sklearn.covariance.LedoitWolf().fit(real_N.reshape(len(real_N), -1))
  return lambda images_N: np.sqrt(gaussian.mahalanobis(images_N.reshape(len(images_N), -1)))


@jax.jit
def _energies(energy: energy_lib.Energy, x: jax.Array) -> jax.Array:
  return energy(x)


def uniform(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Every pixel uniform in [−1, 1]."""
  return rng.uniform(-1, 1, image_N.shape)


def gaussian(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Every pixel normal, with the mean and standard deviation of all pixels of the images."""
  return rng.normal(image_N.mean(), image_N.std(), image_N.shape)


def constant(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Each image of one grey level, or one colour."""
  return np.broadcast_to(rng.uniform(-1, 1, (len(image_N), 1, 1, image_N.shape[-1])), image_N.shape)


def shuffled(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The pixels of each image in random order."""
  N, H, W, C = image_N.shape
  return rng.permuted(image_N.reshape(N, H * W, C), axis=1).reshape(image_N.shape)


def rotated(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Each image turned by 90°."""
  del rng
  return image_N.swapaxes(1, 2)[:, ::-1]


def inverted(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The negative of each image."""
  del rng
  return -image_N


def photographs(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Patches of scikit-learn's two sample photographs, downsized."""
  import sklearn.datasets

  _, H, W, C = image_N.shape
  if C not in (1, 3):
    raise ValueError(
      f"tasks.ood.against: 'photographs' are grey or RGB, but the images have {C} channels: leave 'photographs' out"
    )
  photos = [Image.fromarray(photo) for photo in sklearn.datasets.load_sample_images().images]
  patches = []
  for _ in image_N:
    photo = photos[rng.integers(len(photos))].convert("L" if C == 1 else "RGB")
    left = rng.integers(photo.width - PATCH)
    top = rng.integers(photo.height - PATCH)
    patch = photo.crop((left, top, left + PATCH, top + PATCH)).resize((W, H), Image.Resampling.BOX)
    patches.append(np.asarray(patch).reshape(H, W, C) / 127.5 - 1)
  return np.stack(patches)


MAKERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
  "uniform": uniform,
  "gaussian": gaussian,
  "constant": constant,
  "shuffled": shuffled,
  "rotated": rotated,
  "inverted": inverted,
  "photographs": photographs,
}


def make(name: str, image_N: np.ndarray, seed: int) -> np.ndarray:
  """One outlier of a kind for each image, [N, H, W, C] float32.

  Raises:
    ValueError: for an unknown kind, or one that such images cannot have.
  """
  one_of("tasks.ood.against", name, MAKERS)
  rng = np.random.default_rng([seed, list(MAKERS).index(name)])
  return np.ascontiguousarray(MAKERS[name](image_N, rng), np.float32)
