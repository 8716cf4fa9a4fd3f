"""Data sets with random access: `len(source)` samples, `source[i]` a dict of arrays.

A sample has `label`, and either `image` [H, W, C] float32 in [−1, 1], or the
autoencoder's `mean` and `logvar` [H, W, C], from which training draws a latent
anew each time.
"""

import inspect
import os
from typing import Any, Protocol

import numpy as np
import sklearn.datasets

Sample = dict[str, Any]


class Source(Protocol):
  """What the pipeline and the programs need of a data set."""

  shape: tuple[int, int, int]  # (H, W, C) of a sample
  num_classes: int
  labels: np.ndarray  # [N] int32

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Sample: ...


class Images:
  """Images held in memory: [N, H, W, C] float32 in [−1, 1], and int labels [N]."""

  def __init__(self, images: np.ndarray, labels: np.ndarray, num_classes: int):
    self.images, self.labels, self.num_classes = images, labels.astype(np.int32), num_classes
    self.shape = images.shape[1:]

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Sample:
    return {"image": self.images[index], "label": self.labels[index]}


class Latents:
  """The moments of an autoencoder's posterior, from memory-mapped .npy files.

  The directory holds `mean.npy` and `logvar.npy`, [N, H, W, C] (or [N, 2, H, W, C]:
  the image and its mirror), and `label.npy`, [N]. Latents are scaled by `scale`
  (Stable Diffusion's is 0.18215), which gives them about unit variance.
  """

  def __init__(self, path: str, scale: float, num_classes: int):
    if not scale > 0:
      raise ValueError(f"data.options.scale = {scale} must be positive")
    self._mean, self._logvar, labels = (_mapped(path, name) for name in ("mean.npy", "logvar.npy", "label.npy"))
    if self._mean.shape != self._logvar.shape or len(self._mean) != len(labels) or self._mean.ndim not in (4, 5):
      raise ValueError(
        f"{path}: mean {self._mean.shape}, logvar {self._logvar.shape}, label {labels.shape} do not fit each other"
      )
    self.labels, self.num_classes, self._scale = np.asarray(labels, np.int32), num_classes, scale
    self.shape = self._mean.shape[-3:]

  def __len__(self) -> int:
    return len(self._mean)

  def __getitem__(self, index: int) -> Sample:
    mean = np.asarray(self._mean[index], np.float32) * self._scale
    logvar = np.asarray(self._logvar[index], np.float32) + 2 * np.log(self._scale)
    return {"mean": mean, "logvar": logvar.astype(np.float32), "label": self.labels[index]}


def digits(part: str = "all") -> Images:
  """scikit-learn's 1,797 handwritten digits: 8×8, one channel, 17 grey levels, 10 classes.

  "test" is every sixth image, "train" the others.
  """
  if part not in ("all", "train", "test"):
    raise ValueError(f"data.options.part = {part!r} is neither 'all', 'train' nor 'test'")
  data = sklearn.datasets.load_digits()
  images = (data.images / 8 - 1).astype(np.float32)[..., None]
  sixth = np.arange(len(images)) % 6 == 5
  chosen = {"all": sixth | True, "train": ~sixth, "test": sixth}[part]
  return Images(images[chosen], data.target[chosen], num_classes=10)


def plane(kind: str, count: int = 4096, seed: int = 0) -> Images:
  """Points of the plane as images of one pixel and two channels, of about unit variance.

  "two_moons" has 2 classes, "eight_gaussians" 8, and "checkerboard" the 8 dark squares of
  a 4×4 board.
  """
  if count < 1:
    raise ValueError(f"data.options.count = {count} must be at least 1")
  rng = np.random.default_rng(seed)
  if kind == "two_moons":
    points, labels = sklearn.datasets.make_moons(count, noise=0.05, random_state=seed)
    points = (points - [0.5, 0.25]) * [1.15, 2.0]
  elif kind == "eight_gaussians":
    labels = rng.integers(8, size=count)
    angle = labels * np.pi / 4
    points = 1.4 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + rng.normal(scale=0.1, size=(count, 2))
  elif kind == "checkerboard":
    labels = rng.integers(8, size=count)
    row, column = labels // 2, 2 * (labels % 2) + labels // 2 % 2
    points = (np.stack([column, row], axis=1) + rng.uniform(size=(count, 2)) - 2) * 0.87
  else:
    known = "two_moons, eight_gaussians, checkerboard"
    raise ValueError(f"data.options.kind = {kind!r} is not known: choose one of {known}")
  return Images(points.astype(np.float32)[:, None, None, :], labels, num_classes=2 if kind == "two_moons" else 8)


def open_source(name: str, options: dict[str, Any]) -> Source:
  """The data set that a config names.

  Raises:
    ValueError: if the name is not known, a file is missing, or a label is outside
      the classes.
  """
  known = {"digits": digits, "latents": Latents, "plane": plane}
  if name not in known:
    raise ValueError(f"data.source = {name!r} is not known: choose one of {', '.join(known)}")
  try:
    inspect.signature(known[name]).bind(**options)
  except TypeError as error:
    parameters = ", ".join(inspect.signature(known[name]).parameters) or "none"
    raise ValueError(
      f"data.options {options} do not fit source {name!r}, which takes: {parameters} ({error})"
    ) from error
  source = known[name](**options)
  if len(source) == 0:
    raise ValueError(f"data.source {name!r} is empty ({options})")
  low, high = source.labels.min(), source.labels.max()
  if low < 0 or high >= source.num_classes:
    raise ValueError(f"data.source {name!r} has labels {low}..{high}, but num_classes = {source.num_classes}")
  return source


def _mapped(path: str, name: str) -> np.ndarray:
  file = os.path.join(path, name)
  try:
    return np.load(file, mmap_mode="r")
  except FileNotFoundError as error:
    raise ValueError(f"{file} is missing: a directory of latents holds mean.npy, logvar.npy and label.npy") from error
  except ValueError as error:
    raise ValueError(f"{file}: not a whole .npy file ({error})") from error
