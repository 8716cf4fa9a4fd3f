"""Interface of a data set to the rest of the package: random access to samples, dicts of arrays.

A sample has `label`, and either `image` [H, W, C] float32 in [−1, 1], or the autoencoder's `mean` and `logvar`
[2, H, W, C], of the image and its mirror image, from which training samples a latent anew each time.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

READ_AHEAD = 64  # samples that `arrays` reads at a time

Sample = dict[str, Any]


class Source(Protocol):
  """A data set: `len(source)` samples, `source[i]` one of them."""

  shape: tuple[int, int, int]  # (H, W, C) of a sample
  num_classes: int
  class_names: Sequence[str] | None  # as text, in the order of the labels; None: they have none
  autoencoder_id: dict[str, Any] | None  # `Codec.autoencoder_id` of latents; None: images
  content_hash: str  # hash of the files, to distinguish data sets of the same name and options; "": no files

  @property
  def labels(self) -> np.ndarray: ...  # [N] int32; may take a pass over the data
  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Sample: ...


class Images:
  """Images held in memory: [N, H, W, C] float32 in [−1, 1], and int labels [N]."""

  autoencoder_id = None
  content_hash = ""

  def __init__(
    self, images: np.ndarray, labels: np.ndarray, num_classes: int, class_names: Sequence[str] | None = None
  ):
    self.images = images
    self.labels = checked_labels(labels, num_classes)
    self.num_classes = num_classes
    self.class_names = class_names
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
    raise ValueError(f"{where} is empty: give one with samples")
  low, high = labels.min(), labels.max()
  if low < 0 or high >= num_classes:
    remedy = "give num_classes = None, or as many as there are, and leave images without a class out"
    if (low, high) == (1, num_classes):
      remedy = "they count from 1, subtract 1"
    raise ValueError(
      f"{where} has labels {low}..{high}, but num_classes = {num_classes} has 0..{num_classes - 1}: {remedy}"
    )
  return labels.astype(np.int32)


def in_order(source: Source, indices: Sequence[int], *, batch_size: int, threads: int) -> Iterator[list[Sample]]:
  """The samples `indices` of a data set, in this order and read ahead, in lists of `batch_size`, the last shorter."""
  data = grain.MapDataset.range(len(indices)).map(lambda position: source[int(indices[position])])
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(batch_size, threads))
  with contextlib.closing(iter(data.to_iter_dataset(options))) as samples:
    for first in range(0, len(indices), batch_size):
      yield [next(samples) for _ in range(min(batch_size, len(indices) - first))]


def spread(source: Source | int, count: int) -> np.ndarray:
  """Indices of at most `count` samples, evenly spaced over a data set (or over its length).

  Folders and caches are sorted by class, so their first samples are of one class or a few; these are of all.
  """
  length = source if isinstance(source, int) else len(source)
  return np.linspace(0, length - 1, min(count, length)).astype(int)


def arrays(source: Source, indices: Sequence[int], threads: int = 4) -> np.ndarray:
  """The images at `indices`, or the means of their latents (of the unmirrored image): [N, H, W, C] float32."""
  return arrays_and_labels(source, indices, threads)[0]


def arrays_and_labels(source: Source, indices: Sequence[int], threads: int = 4) -> tuple[np.ndarray, np.ndarray]:
  """`arrays`, and the labels [N], each sample read once."""
  images, labels = [], []
  for samples in in_order(source, indices, batch_size=READ_AHEAD, threads=threads):
    images.append(np.stack([_array(sample) for sample in samples]))
    labels += [sample["label"] for sample in samples]
  return np.concatenate(images), np.asarray(labels)


def _array(sample: Sample) -> np.ndarray:
  return sample["image"] if "image" in sample else sample["mean"][0]
