"""What a data set is to the rest of the package: random access to samples, dicts of arrays.

A sample has `label`, and either `image` [H, W, C] float32 in [−1, 1], or the
autoencoder's `mean` and `logvar` [2, H, W, C], of the image and its mirror image, from which
training draws a latent anew each time.
"""

from typing import Any, Protocol

import numpy as np

Sample = dict[str, Any]


class Source(Protocol):
  """A data set: `len(source)` samples, `source[i]` one of them."""

  shape: tuple[int, int, int]  # (H, W, C) of a sample
  num_classes: int
  autoencoder: dict[str, Any] | None  # whose latents they are, as `Codec.identity` has it; None: they are images
  contents: str  # tells it from others of its name and options: a hash of what files it has; "": there are none

  @property
  def labels(self) -> np.ndarray: ...  # [N] int32; may take a pass over the data
  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Sample: ...


class Images:
  """Images held in memory: [N, H, W, C] float32 in [−1, 1], and int labels [N]."""

  autoencoder = None
  contents = ""

  def __init__(self, images: np.ndarray, labels: np.ndarray, num_classes: int):
    self.images, self.labels, self.num_classes = images, checked_labels(labels, num_classes), num_classes
    self.shape = images.shape[1:]

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Sample:
    return {"image": self.images[index], "label": self.labels[index]}


def checked_labels(labels: np.ndarray, num_classes: int, where: str = "the data set") -> np.ndarray:
  """Labels as int32.

  Raises:
    ValueError: if there are none, or one is not in 0..num_classes − 1.
  """
  if not len(labels):
    raise ValueError(f"{where} is empty")
  low, high = labels.min(), labels.max()
  if low < 0 or high >= num_classes:
    raise ValueError(f"{where} has labels {low}..{high}, but num_classes = {num_classes}")
  return labels.astype(np.int32)
