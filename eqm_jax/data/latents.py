"""The latent cache: the autoencoder's posterior of every image and of its mirror image, on disk.

A directory of ArrayRecord shards and one manifest.json. A record is a sample: the label (int32), then mean and
log-variance, each [2, h, w, c] (the image, its mirror image), unscaled, float16 or bfloat16, little-endian.

Reading needs the manifest, which is written last (encode_latents.py), so an incomplete cache is refused.
"""

import dataclasses
import hashlib
import os
from typing import Any

import grain
import ml_dtypes
import numpy as np

from eqm_jax import checks
from eqm_jax.data.samples import Sample, checked_labels
from eqm_jax.io import allow_open_files, read_json
from eqm_jax.progress import Progress

MANIFEST = "manifest.json"
SETTINGS = "settings.json"
VERSION = 1
DTYPES = {"float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SIDES = 2  # the image and its mirror image
REMAKE = "copy it again, or remove the directory and run --mode=prepare"


@dataclasses.dataclass(frozen=True)
class Settings:
  """Contents of a cache.

  Raises:
    ValueError: if a value is not allowed.
  """

  source: str  # name and options of the data set, as in the config, without its path, which may change
  options: dict[str, Any]
  contents: str  # `Source.content_hash`
  images: int  # number in the data set, damaged ones included
  num_classes: int
  image_size: int  # pixels, after the crop
  latent_shape: tuple[int, int, int]
  dtype: str  # one of DTYPES
  images_per_shard: int
  autoencoder: dict[str, Any]  # name ("ema", "mse", ...), sha256 of its parameters, scaling_factor
  crop: str = "ADM centre crop"  # of sources that crop
  version: int = VERSION

  def __post_init__(self):
    checks.one_of("prepare.dtype", self.dtype, DTYPES)
    checks.at_least("prepare.images_per_shard", self.images_per_shard, 1)

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

  A sample has both sides: `mean` and `logvar` [2, h, w, c]; the pipeline chooses one.
  """

  def __init__(self, path: str, verify: bool = False):
    """Opens a cache.

    Args:
      path: its directory.
      verify: reads every shard once and compares its checksum; sizes are always compared.

    Raises:
      ValueError: naming the file, if the cache is not there, not finished or damaged.
    """
    manifest = read_manifest(path)
    _check_shards(path, manifest, verify)
    self.autoencoder_id = manifest["autoencoder"]
    self.content_hash = manifest["contents"]
    self.num_classes = manifest["num_classes"]
    self.class_names = manifest.get("class_names")  # older caches have none
    self.shape = tuple(manifest["latent_shape"])
    labels = " ".join(shard["labels"] for shard in manifest["shards"])
    self.labels = checked_labels(np.asarray(labels.split(), np.int32), self.num_classes, path)
    self._path = path
    self._dtype = DTYPES[manifest["dtype"]]
    scale = self.autoencoder_id["scaling_factor"]
    self._scale, self._log_scale = np.float32(scale), np.float32(2 * np.log(scale))
    # With the manifest's counts, as in "file[0:count]", files are opened only when they are read.
    shards = [shard for shard in manifest["shards"] if shard["records"]]
    allow_open_files(len(shards))
    files = [f"{os.path.join(path, shard['file'])}[0:{shard['records']}]" for shard in shards]
    self._records = grain.sources.ArrayRecordDataSource(files)

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> Sample:
    return self.side(index, slice(None))

  def side(self, index: int, side: int | slice) -> Sample:
    """The sample with one side only, [h, w, c], at half the cost."""
    try:
      record = self._records[index]
    except (RuntimeError, ValueError) as error:
      raise ValueError(
        f"{self._path}: record {index} cannot be read ({error}): the cache is damaged, {REMAKE}"
      ) from error
    label = np.frombuffer(record, "<i4", 1)[0]
    moments = np.frombuffer(record, self._dtype, offset=4).reshape(2, SIDES, *self.shape)
    return {
      "mean": moments[0, side].astype(np.float32) * self._scale,
      "logvar": moments[1, side].astype(np.float32) + self._log_scale,
      "label": label,
    }


def check_path(path: str):
  """Raises ValueError for a bucket."""
  if "://" in path:
    raise ValueError(f"{path}: ArrayRecord reads and writes mounted files only: mount the bucket and give its path")


def is_finished(path: str) -> bool:
  """Whether `path` holds a complete cache."""
  return os.path.exists(os.path.join(path, MANIFEST))


def read_manifest(path: str) -> dict[str, Any]:
  """Settings, records and shards of a cache.

  Raises:
    ValueError: if there is no finished cache, or its manifest is damaged.
  """
  check_path(path)
  file = os.path.join(path, MANIFEST)
  if not os.path.exists(file):
    state = "was begun and not finished" if os.path.exists(os.path.join(path, SETTINGS)) else "is not there"
    raise ValueError(f"{path}: the cache of latents {state} (no {MANIFEST}): run --mode=prepare")
  manifest = read_json(file)
  needed = [field.name for field in dataclasses.fields(Settings)] + ["records", "shards"]
  missing = [name for name in needed if not isinstance(manifest, dict) or name not in manifest]
  if missing:
    raise ValueError(f"{file}: not the manifest of a cache: it lacks {', '.join(missing)}. Give another path")
  if manifest["version"] != VERSION or manifest["dtype"] not in DTYPES:
    raise ValueError(
      f"{file}: version {manifest['version']} of dtype {manifest['dtype']}, but only version {VERSION} of "
      f"{', '.join(DTYPES)} can be read: {REMAKE}"
    )
  return manifest


def check_same(where: str, saved: dict[str, Any], requested: dict[str, Any]):
  """Refuses a cache whose settings differ from `requested`, a part of them.

  Raises:
    ValueError: naming the differences.
  """
  different = [
    f"{name}: {saved.get(name)!r} saved, {value!r} requested"
    for name, value in requested.items()
    if saved.get(name) != value
  ]
  if different:
    raise ValueError(
      f"{where} is of other latents: {'; '.join(different)}. Set the config to what is saved, or give another path"
    )


def _check_shards(path: str, manifest: dict[str, Any], verify: bool):
  for shard in manifest["shards"]:
    file = os.path.join(path, shard["file"])
    if not os.path.exists(file):
      raise ValueError(f"{file} is missing, but {MANIFEST} names it: {REMAKE}")
    if os.path.getsize(file) != shard["bytes"]:
      raise ValueError(f"{file}: {os.path.getsize(file)} bytes, but {MANIFEST} has {shard['bytes']}: damaged, {REMAKE}")
  if not verify:
    return
  for shard in Progress(manifest["shards"], desc="checksums", unit="shard"):
    file = os.path.join(path, shard["file"])
    if checksum(file) != shard["sha256"]:
      raise ValueError(f"{file}: its SHA-256 is not that of {MANIFEST}: damaged, {REMAKE}")


def checksum(file: str) -> str:
  """The SHA-256 of a file."""
  with open(file, "rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()
