"""Data sets of images on disk: a directory for each class, TFDS builds, .npz files. Paths are local or gs://."""

import functools
import hashlib
import re
from collections.abc import Iterator

import numpy as np
from etils import epath

from eqm_jax import checks
from eqm_jax.data import images
from eqm_jax.data.samples import Images, Sample, checked_labels
from eqm_jax.io import allow_open_files

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


class Folder:
  """One directory for each class, the images anywhere below it, in the order of torchvision's ImageFolder."""

  autoencoder_id = None

  def __init__(self, path: str, size: int, channels: int = 3):
    """Lists the files; images are read on access, and cropped as in ADM.

    Args:
      path: the directory of the classes, which are numbered in the order of their names.
      size: of the images, pixels.
      channels: 3, RGB, or 1, grey.

    Raises:
      ValueError: naming the directory, if it is missing, holds no class, or a class has no image.
    """
    _check_size(size, channels)
    root = epath.Path(path)
    if not root.is_dir():
      raise ValueError(f"{path}: no such directory of images (docs/data.md lists what to fetch, and where to put it)")
    classes = sorted(entry for entry in root.iterdir() if not entry.name.startswith(".") and entry.is_dir())
    if not classes:
      raise ValueError(f"{path}: holds no directory: put the images of each class into one, or all into a single one")
    # In the order of sorted(os.walk(class)): by directory, then by name.
    files = [sorted(_images_below(directory), key=lambda file: (str(file.parent), file.name)) for directory in classes]
    empty = [str(directory) for directory, images_of_class in zip(classes, files) if not images_of_class]
    if empty:
      raise ValueError(
        f"{empty[0]}: a class without images ({', '.join(EXTENSIONS)}), one of {len(empty)} in {path}: remove them"
      )
    self.files = [file for images_of_class in files for file in images_of_class]
    self.num_classes = len(classes)
    names = "\n".join(str(file.relative_to(root)) for file in self.files)
    self.content_hash = hashlib.sha256(names.encode()).hexdigest()
    self.labels = np.repeat(np.arange(len(classes), dtype=np.int32), list(map(len, files)))
    self.shape = (size, size, channels)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Sample:
    file = self.files[index]  # a failing disk is no damaged image: its OSError names the file
    return {"image": _image(file.read_bytes(), str(file), self.shape), "label": self.labels[index]}


class Tfds:
  """A build of TensorFlow Datasets with `image` and `label`, in ArrayRecord files; needs no TensorFlow."""

  autoencoder_id = None

  def __init__(self, name: str, path: str, split: str = "train", size: int = 32, channels: int = 3):
    """Opens a build; downloads and prepares nothing.

    Args:
      name: "imagenet2012", or with config and version "imagenet2012/config:5.1.0"; without a version the newest.
      path: the directory of all builds, TFDS's data_dir.
      split: "train", or a part such as "train[:90%]".
      size: of the images, pixels; they are cropped as in ADM.
      channels: 3, RGB, or 1, grey.

    Raises:
      ValueError: if the build is not there, with the command that makes it.
    """
    _check_size(size, channels)
    try:
      import tensorflow_datasets as tfds
    except ImportError as error:
      raise ValueError("data.source = 'tfds' needs the package: pip install tensorflow-datasets") from error
    directory = _newest_version(epath.Path(path), name)
    builder = tfds.builder_from_directory(directory)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
      raise ValueError(
        f"{directory}: holds {builder.info.file_format.value} files, which have no random access: convert them by "
        f"tfds convert_format --root_data_dir={path} --out_file_format=array_record --out_dir=NEW_PATH"
      )
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not isinstance(features["label"], tfds.features.ClassLabel):
      raise ValueError(
        f"{directory}: its samples have {', '.join(sorted(features))}, but need `image`, and `label` that is a class: "
        "give another data set"
      )
    allow_open_files(sum(info.num_shards for info in builder.info.splits.values()))  # files stay open once read
    try:
      self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except (ValueError, KeyError, FileNotFoundError) as error:
      raise ValueError(
        f"{directory}: split {split!r} cannot be opened ({error}): give another data.options.split"
      ) from error
    self.num_classes = features["label"].num_classes
    self.shape = (size, size, channels)
    self._where = f"{directory}, {split}"
    self.content_hash = directory.name  # the version

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """Labels of all samples, which takes a pass over all files."""
    labels = np.asarray([self._records[i]["label"] for i in range(len(self))])
    return checked_labels(labels, self.num_classes, self._where)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Sample:
    try:
      record = self._records[index]
    except RuntimeError as error:
      raise OSError(
        f"{self._where}: record {index} cannot be read ({error}): the build is damaged, build it again"
      ) from error
    image = _image(record["image"], f"{self._where}: image {index}", self.shape)
    return {"image": image, "label": np.int32(record["label"])}


def npz(path: str, num_classes: int | None = None) -> Images:
  """The images of an .npz, `image`, `x` or `arr_0` [N, H, W, C] uint8 or float in [−1, 1].

  Labels are `label` or `arr_1` [N]; without them all are of class 0. Without `num_classes` the largest label is that of
  the last class.
  """
  arrays, labels = images.npz_arrays(path)
  labels = np.zeros(len(arrays), np.int32) if labels is None else labels
  source = Images(images.to_float(arrays, path), labels, num_classes or int(labels.max()) + 1)
  source.content_hash = hashlib.sha256(np.ascontiguousarray(arrays).tobytes()).hexdigest()
  return source


def _check_size(size: int, channels: int):
  checks.at_least("data.options.size", size, 1)
  checks.one_of("data.options.channels", channels, images.MODES)


def _images_below(directory: epath.Path) -> Iterator[epath.Path]:
  entries = list(directory.iterdir())
  # Names of images are not tested for being a directory, which is slow on network disks.
  yield from (entry for entry in entries if entry.suffix.lower() in EXTENSIONS)
  for entry in entries:
    if entry.suffix.lower() not in EXTENSIONS and entry.is_dir():
      yield from _images_below(entry)


def _image(data: bytes, where: str, shape: tuple[int, int, int]) -> np.ndarray:
  return images.to_float(images.decode(data, where, shape[0], shape[2]), where)


def _newest_version(root: epath.Path, name: str) -> epath.Path:
  """The directory of a build."""
  dataset, _, version = name.partition(":")
  base = root / dataset
  if version:
    builds = [base / version]
  else:
    builds = sorted(base.iterdir(), key=_version) if base.is_dir() else []
  builds = [directory for directory in builds if (directory / "dataset_info.json").exists()]
  if not builds:
    raise ValueError(
      f"{base / version if version else base}: no such TFDS build. On a machine with TensorFlow and network: "
      f"tfds build {name} --file_format=array_record --data_dir={root}"
    )
  return builds[-1]


def _version(directory: epath.Path) -> tuple[int, ...]:
  return tuple(int(number) for number in re.findall(r"\d+", directory.name))
