"""The latent cache: the autoencoder's posterior of every image and of its mirror image, on disk.

A directory of ArrayRecord shards and one manifest.json. A record is a sample: the label
(int32), then mean and log-variance, each [2, h, w, c] (the image, its mirror image),
unscaled, float16 or bfloat16, little-endian.

Whoever reads needs the manifest, which is written last (encoding.py), so a cache that is not
whole is never taken for one.
"""

import dataclasses
import hashlib
import os
from typing import Any

import grain
import ml_dtypes
import numpy as np
import tqdm

from eqm_jax.data.samples import Sample, checked_labels
from eqm_jax.files import allow_open_files, read_json

MANIFEST = "manifest.json"
SETTINGS = "settings.json"
VERSION = 1
DTYPES = {"float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SIDES = 2  # the image and its mirror image


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a cache holds.

  Raises:
    ValueError: if a value is none that it can have.
  """

  source: str  # name and options of the data set, as in the config, but for its path: that may change
  options: dict[str, Any]
  contents: str  # `Source.contents`
  images: int  # of the data set, damaged ones included
  num_classes: int
  image_size: int  # pixels, after the crop
  latent_shape: tuple[int, int, int]
  dtype: str  # one of DTYPES
  images_per_shard: int
  autoencoder: dict[str, Any]  # name ("ema", "mse", ...), sha256 of its parameters, scaling_factor
  crop: str = "ADM centre crop"  # of sources that crop
  version: int = VERSION

  def __post_init__(self):
    if self.dtype not in DTYPES or self.images_per_shard < 1:
      raise ValueError(
        f"prepare.dtype = {self.dtype!r} must be one of {', '.join(DTYPES)}, "
        f"and prepare.images_per_shard = {self.images_per_shard} at least 1"
      )

  @property
  def shards(self) -> int:
    return -(-self.images // self.images_per_shard)

  @property
  def record_bytes(self) -> int:
    return 4 + 2 * SIDES * int(np.prod(self.latent_shape)) * DTYPES[self.dtype].itemsize

  def to_json(self) -> dict[str, Any]:
    return {**dataclasses.asdict(self), "latent_shape": list(self.latent_shape)}


class Latents:
  """A finished cache as a data set; latents are scaled to about unit variance.

  A sample holds both sides: `mean` and `logvar` [2, h, w, c]; the pipeline chooses one.
  """

  def __init__(self, path: str, verify: bool = False):
    """Opens a cache.

    Args:
      path: its directory.
      verify: read every shard once and compare its checksum; sizes are always compared.

    Raises:
      ValueError: naming the file, if the cache is not there, not finished or damaged.
    """
    manifest = read_manifest(path)
    _check_shards(path, manifest, verify)
    self.autoencoder, self.contents = manifest["autoencoder"], manifest["contents"]
    self.num_classes, self.shape = manifest["num_classes"], tuple(manifest["latent_shape"])
    labels = " ".join(shard["labels"] for shard in manifest["shards"])
    self.labels = checked_labels(np.asarray(labels.split(), np.int32), self.num_classes, path)
    self._path, self._dtype = path, DTYPES[manifest["dtype"]]
    scale = self.autoencoder["scaling_factor"]
    self._scale, self._log_scale = np.float32(scale), np.float32(2 * np.log(scale))
    # With the manifest's counts, "file[0:count]", no file is opened before it is read.
    shards = [shard for shard in manifest["shards"] if shard["records"]]
    allow_open_files(len(shards))
    files = [f"{os.path.join(path, shard['file'])}[0:{shard['records']}]" for shard in shards]
    self._records = grain.sources.ArrayRecordDataSource(files)

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> Sample:
    return self.side(index, slice(None))

  def side(self, index: int, side: int | slice) -> Sample:
    """The sample with one side alone, [h, w, c], which is half of the work."""
    try:
      record = self._records[index]
    except (RuntimeError, ValueError) as error:
      raise ValueError(f"{self._path}: record {index} cannot be read ({error}): the cache is damaged") from error
    label = np.frombuffer(record, "<i4", 1)[0]
    moments = np.frombuffer(record, self._dtype, offset=4).reshape(2, SIDES, *self.shape)
    return {
      "mean": moments[0, side].astype(np.float32) * self._scale,
      "logvar": moments[1, side].astype(np.float32) + self._log_scale,
      "label": label,
    }


def check_path(path: str):
  """Refuses, as a ValueError, a bucket."""
  if "://" in path:
    raise ValueError(f"{path}: ArrayRecord reads and writes mounted files only: mount the bucket and give its path")


def is_finished(path: str) -> bool:
  """Whether there is a cache that is whole."""
  return os.path.exists(os.path.join(path, MANIFEST))


def read_manifest(path: str) -> dict[str, Any]:
  """What a cache holds.

  Raises:
    ValueError: if there is no finished cache, or its manifest is damaged.
  """
  check_path(path)
  file = os.path.join(path, MANIFEST)
  if not os.path.exists(file):
    begun = "was begun and not finished" if os.path.exists(os.path.join(path, SETTINGS)) else "is not there"
    raise ValueError(f"{path}: the cache of latents {begun} (no {MANIFEST}): run --mode=prepare")
  manifest = read_json(file)
  needed = [field.name for field in dataclasses.fields(Settings)] + ["records", "shards"]
  missing = [name for name in needed if not isinstance(manifest, dict) or name not in manifest]
  if missing:
    raise ValueError(f"{file}: not the manifest of a cache: it lacks {', '.join(missing)}")
  if manifest["version"] != VERSION or manifest["dtype"] not in DTYPES:
    raise ValueError(
      f"{file}: version {manifest['version']} of dtype {manifest['dtype']}, "
      f"but only version {VERSION} of {', '.join(DTYPES)} is known"
    )
  return manifest


def check_same(where: str, there: dict[str, Any], wanted: dict[str, Any]):
  """Refuses a cache that holds something else than `wanted` (a part of the settings).

  Raises:
    ValueError: naming what differs.
  """
  found = [
    f"{name}: {there.get(name)!r} there, {value!r} wanted" for name, value in wanted.items() if there.get(name) != value
  ]
  if found:
    raise ValueError(
      f"{where} is of other latents: {'; '.join(found)}. Set the config to what is there, or give another path"
    )


def _check_shards(path: str, manifest: dict[str, Any], verify: bool):
  for shard in manifest["shards"]:
    file = os.path.join(path, shard["file"])
    if not os.path.exists(file):
      raise ValueError(f"{file} is missing, but {MANIFEST} names it")
    if os.path.getsize(file) != shard["bytes"]:
      raise ValueError(f"{file}: {os.path.getsize(file)} bytes, but {MANIFEST} says {shard['bytes']}: damaged")
  for shard in tqdm.tqdm(manifest["shards"], desc="checksums", unit="shard", disable=None if verify else True):
    if verify and checksum(os.path.join(path, shard["file"])) != shard["sha256"]:
      raise ValueError(
        f"{os.path.join(path, shard['file'])}: its SHA-256 is not that of {MANIFEST}: damaged. "
        f"Copy it anew, or remove the directory and run --mode=prepare"
      )


def checksum(file: str) -> str:
  """The SHA-256 of a file."""
  with open(file, "rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()
