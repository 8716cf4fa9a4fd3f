"""Data sets of images on disk: a directory for each class, TFDS builds. Paths are local or gs://."""

import functools
import re

import numpy as np
from etils import epath

from eqm_jax import checks
from eqm_jax.data import arrays, images, listing
from eqm_jax.data.samples import Sample, checked_labels
from eqm_jax.io import allow_open_files


class Folder:
  """One directory for each class, the images anywhere below it, in the order of torchvision's ImageFolder."""

  autoencoder_id = None

  def __init__(self, path: str, size: int, channels: int = 3, *, upright: bool = False, background: str | None = None):
    """Lists the files, and logs what it leaves out; images are read on access, and cropped as in ADM.

    Args:
      path: the directory of the classes, which are numbered in the order of their names; or one of images, of one
        class.
      size: of the images, pixels.
      channels: 3, RGB, or 1, grey.
      upright, background: as `images.decode` takes them.

    Raises:
      ValueError: naming the directory, if it is missing, holds no image, or a class has none.
      OSError: if it cannot be read.
    """
    self._decoder = _Decoder(size, channels, upright, background)
    if not epath.Path(path).is_dir():
      raise ValueError(f"{path}: no such directory of images (docs/data.md lists what to fetch, and where to put it)")
    listed = listing.list_classes(path)
    listed.log()
    self.files = listed.files
    self.class_names = tuple(listed.classes)
    self.num_classes = len(listed.classes)
    self.content_hash = listed.content_hash
    self.labels = np.repeat(np.arange(self.num_classes, dtype=np.int32), list(map(len, listed.classes.values())))
    self.shape = self._decoder.shape

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Sample:
    file = self.files[index]
    data = epath.Path(file).read_bytes()  # a failing disk is no damaged image: its OSError names the file
    return {"image": self._decoder(data, file), "label": self.labels[index]}


class Tfds:
  """A build of TensorFlow Datasets with `image` and `label`, in ArrayRecord files; needs no TensorFlow."""

  autoencoder_id = None

  def __init__(
    self,
    name: str,
    path: str,
    split: str = "train",
    size: int = 32,
    channels: int = 3,
    *,
    upright: bool = False,
    background: str | None = None,
  ):
    """Opens a build; downloads and prepares nothing.

    Args:
      name: "imagenet2012", or with config and version "imagenet2012/config:5.1.0"; without a version the newest.
      path: the directory of all builds, TFDS's data_dir.
      split: "train", or a part such as "train[:90%]".
      size: of the images, pixels; they are cropped as in ADM.
      channels: 3, RGB, or 1, grey.
      upright, background: as `images.decode` takes them.

    Raises:
      ValueError: if the build is not there, with the command that makes it.
    """
    self._decoder = _Decoder(size, channels, upright, background)
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
    self.class_names = tuple(features["label"].names)
    self.shape = self._decoder.shape
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
    image = self._decoder(record["image"], f"{self._where}: image {index}")
    return {"image": image, "label": np.int32(record["label"])}


class _Decoder:
  """Image files → float32 arrays of one size."""

  def __init__(self, size: int, channels: int, upright: bool, background: str | None):
    checks.at_least("data.options.size", size, 1)
    checks.one_of("data.options.channels", channels, images.MODES)
    checks.one_of("data.options.background", background, images.BACKGROUNDS)
    self.shape = (size, size, channels)
    self._options = {"upright": upright, "background": background}

  def __call__(self, data: bytes, where: str) -> np.ndarray:
    size, _, channels = self.shape
    return arrays.to_float(images.decode(data, where, size, channels, **self._options), where)


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
