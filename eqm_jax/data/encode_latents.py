"""Filling the latent cache: images → autoencoder → shards, by one process or several; a killed one continues.

An unfinished cache has settings.json, and beside each finished shard a .json with size and checksum. A shard is written
under another name, its records are counted, it is renamed, and then its .json is written; a shard without one is made
again. When all are there, `finish` writes the manifest and removes these files.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from eqm_jax.data import latents
from eqm_jax.data.images import DamagedImage
from eqm_jax.data.samples import Sample, Source, in_order
from eqm_jax.io import read_json, write_json
from eqm_jax.progress import Progress

# images [B, H, W, C] → mean, logvar [B, 2, h, w, c]
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Job:
  """Arguments of `write`."""

  path: str
  source: Source
  encode: Encode
  settings: latents.Settings
  batch_size: int
  threads: int
  skip_damaged: bool


def write(
  path: str,
  source: Source,
  encode: Encode,
  settings: latents.Settings,
  *,
  batch_size: int,
  threads: int,
  skip_damaged: bool = False,
  process_index: int = 0,
  process_count: int = 1,
) -> int:
  """Encodes what is not encoded yet: process p of n takes every n-th shard, from the p-th on.

  After a kill, another call continues with the first unfinished shard. When all processes are through, `finish` makes
  the cache of their shards.

  Args:
    path: the directory, made if it is not there; the same for all processes.
    source: images, in any order.
    encode: the autoencoder.
    settings: the contents of the cache.
    batch_size: images for the autoencoder at a time.
    threads: how many threads read images ahead.
    skip_damaged: leaves damaged images out, and counts them; otherwise the first one is an error. One that is too large
      to decode is an error always.

  Returns:
    How many images were encoded now.

  Raises:
    ValueError: if the directory holds something else, the disk has too little room, or an image is damaged; naming it.
    OSError: if writing fails; the finished shards stay.
  """
  latents.check_path(path)
  _begin(path, settings, writes=process_index == 0)
  own = range(process_index, settings.shards, process_count)
  missing = [shard for shard in range(settings.shards) if not _is_finished(path, settings, shard)]
  todo = [shard for shard in missing if shard in own]
  _check_room(path, settings, missing)  # those of the other processes are written to the same disk
  if len(todo) < len(own):
    log.info("%s: %d of %d shards are finished already", path, len(own) - len(todo), len(own))
  job = _Job(path, source, encode, settings, batch_size, threads, skip_damaged)
  encoded = 0
  with Progress(total=sum(len(_range(settings, shard)) for shard in todo), desc="encoding", unit="image") as progress:
    for shard in todo:
      encoded += _write_shard(job, shard, progress)
  return encoded


def finish(path: str, settings: latents.Settings, class_names: Sequence[str] | None = None) -> dict[str, Any]:
  """Writes the manifest, once the shards of all processes are there.

  Args:
    path, settings: as in `write`.
    class_names: `Source.class_names`.

  Raises:
    ValueError: naming the first shard that is not finished.
  """
  for shard in range(settings.shards):
    if not _is_finished(path, settings, shard):
      raise ValueError(f"{os.path.join(path, _name(settings, shard))} is not finished: run the preparation again")
  shards = [read_json(_description(path, settings, shard)) for shard in range(settings.shards)]
  skipped = [name for shard in shards for name in shard["skipped"]]
  records = sum(shard["records"] for shard in shards)
  if not records:
    raise ValueError(f"{path}: all {settings.images} images are damaged ({skipped[0]}): give another data set")
  manifest = {**settings.to_json(), "class_names": class_names, "records": records, "shards": shards}
  write_json(os.path.join(path, latents.MANIFEST), manifest)
  for shard in range(settings.shards):
    os.remove(_description(path, settings, shard))
  os.remove(os.path.join(path, latents.SETTINGS))
  return manifest


def _begin(path: str, settings: latents.Settings, writes: bool):
  """Writes the settings into the directory, and refuses a directory of other settings."""
  os.makedirs(path, exist_ok=True)
  requested = settings.to_json()
  for name in (latents.MANIFEST, latents.SETTINGS):
    file = os.path.join(path, name)
    if os.path.exists(file):
      latents.check_same(file, read_json(file), requested)
      return
  if writes:
    write_json(os.path.join(path, latents.SETTINGS), requested)


def _write_shard(job: _Job, shard: int, progress: Progress) -> int:
  """Writes one shard under another name, counts its records, renames and describes it; returns their number."""
  file = os.path.join(job.path, _name(job.settings, shard))
  partial = f"{file}.partial"
  try:
    labels, skipped = _write_records(job, _range(job.settings, shard), partial, progress)
    description = {
      "file": os.path.basename(file),
      "bytes": os.path.getsize(partial),
      "sha256": latents.checksum(partial),
      "records": len(labels),
      "skipped": skipped,
      "labels": " ".join(map(str, labels)),  # one line of text: a JSON list would be a line for each label
    }
    with open(partial, "rb") as written:
      os.fsync(written.fileno())
    os.replace(partial, file)
  finally:
    if os.path.exists(partial):
      os.remove(partial)
  write_json(_description(job.path, job.settings, shard), description)
  return len(labels)


def _write_records(job: _Job, indices: range, file: str, progress: Progress) -> tuple[list[int], list[str]]:
  """Writes the records of `indices`; returns their labels, and the reasons of the images that were left out."""
  labels, skipped = [], []
  with _disk_errors(file):
    writer = array_record_module.ArrayRecordWriter(file, "group_size:1,uncompressed")
  try:
    for samples in in_order(_Guarded(job.source), indices, batch_size=job.batch_size, threads=job.threads):
      damaged = [sample["damaged"] for sample in samples if "damaged" in sample]
      if damaged and not job.skip_damaged:
        raise ValueError(f"{damaged[0]}. Mend it, or leave such images out with prepare.skip_damaged = True")
      for reason in damaged:
        log.warning("left out: %s", reason)
      skipped += damaged
      intact = [sample for sample in samples if "damaged" not in sample]
      for label, record in _records(intact, job.encode, job.settings):
        with _disk_errors(file):
          writer.write(record)
        labels.append(label)
      progress.update(len(samples))
  finally:
    with _disk_errors(file):
      writer.close()
  with _disk_errors(file):
    _check_count(file, len(labels))
  return labels, skipped


@contextlib.contextmanager
def _disk_errors(file: str) -> Iterator[None]:
  """Turns ArrayRecord's RuntimeError of a failing disk into an OSError."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(
      f"{file} cannot be written ({error}); the shards before it are complete: make room, and start again"
    ) from error


def _records(samples: list[Sample], encode: Encode, settings: latents.Settings) -> Iterator[tuple[int, bytes]]:
  """Pairs (label, record) of samples that are encoded together."""
  if not samples:
    return
  images = np.stack([sample["image"] for sample in samples])
  moments = [moment.astype(latents.DTYPES[settings.dtype]) for moment in encode(images)]
  if not all(np.all(np.isfinite(moment.astype(np.float32))) for moment in moments):
    raise ValueError(
      f"the autoencoder's latents are not finite in {settings.dtype}: "
      "let it compute in float32 (autoencoder.dtype), or store bfloat16 (prepare.dtype)"
    )
  for sample, mean, logvar in zip(samples, *moments):
    label = int(sample["label"])
    yield label, np.asarray(label, "<i4").tobytes() + mean.tobytes() + logvar.tobytes()


class _Guarded:
  """A source with {"damaged": reason} in place of a damaged image."""

  def __init__(self, source: Source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Sample:
    try:
      return self._source[index]
    except DamagedImage as error:
      return {"damaged": str(error)}


def _range(settings: latents.Settings, shard: int) -> range:
  first = shard * settings.images_per_shard
  return range(first, min(first + settings.images_per_shard, settings.images))


def _name(settings: latents.Settings, shard: int) -> str:
  return f"latents-{shard:05d}-of-{settings.shards:05d}.array_record"


def _description(path: str, settings: latents.Settings, shard: int) -> str:
  return os.path.join(path, f"{_name(settings, shard)}.json")


def _is_finished(path: str, settings: latents.Settings, shard: int) -> bool:
  """Whether the shard is described and has the size in its description."""
  if latents.is_finished(path):
    return True
  file, description = os.path.join(path, _name(settings, shard)), _description(path, settings, shard)
  described = os.path.exists(description) and os.path.exists(file)
  return described and os.path.getsize(file) == read_json(description)["bytes"]


def _check_room(path: str, settings: latents.Settings, todo: list[int]):
  """Raises ValueError if the shards `todo` would fill the disk."""
  needed = settings.record_bytes * sum(len(_range(settings, shard)) for shard in todo)
  free = shutil.disk_usage(path).free
  if needed > free:
    raise ValueError(
      f"{path}: the cache needs {needed / 1e9:.2f} GB more, but the disk has {free / 1e9:.2f} GB: "
      "make room, or give another path"
    )


def _check_count(file: str, records: int):
  """Reads the end of a shard back, which shows what a full disk cut off."""
  reader = array_record_module.ArrayRecordReader(file)
  try:
    if reader.num_records() != records:
      raise OSError(f"{file}: {reader.num_records()} of {records} records are on the disk: make room, and start again")
  finally:
    reader.close()
