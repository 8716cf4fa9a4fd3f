"""Fills the latent cache: images → autoencoder → shards, on one process or many, killed or not.

While a cache is made there are settings.json, which tells what is being made, and beside each
finished shard its .json, with size and checksum. A shard is written under another name,
its records are counted, it is renamed, and then told; one that is not told is made again.
When all are there, `finish` puts the manifest in the place of these files.
"""

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tqdm
from array_record.python import array_record_module

from eqm_jax.data import latents, pipeline
from eqm_jax.data.images import DamagedImage
from eqm_jax.data.samples import Sample, Source
from eqm_jax.files import read_json, write_json

# images [B, H, W, C] → mean, logvar [B, 2, h, w, c]
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

log = logging.getLogger(__name__)


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

  Killed and started again, it goes on with the first shard that is not finished. When all
  processes are through, `finish` makes the cache of their shards.

  Args:
    path: the directory, made if it is not there; the same for all processes.
    source: images, in any order.
    encode: the autoencoder.
    settings: what is made.
    batch_size: images that it is given at a time.
    threads: that read images ahead.
    skip_damaged: leave damaged images out, and count them; otherwise the first one ends it.

  Returns:
    How many images were encoded now.

  Raises:
    ValueError: if the directory holds something else, there is no room for it on the
      disk, or an image is damaged; naming it.
    OSError: if writing fails; the finished shards stay.
  """
  latents.check_path(path)
  _begin(path, settings, writes=process_index == 0)
  mine = range(process_index, settings.shards, process_count)
  missing = [shard for shard in range(settings.shards) if not _is_finished(path, settings, shard)]
  todo = [shard for shard in missing if shard in mine]
  _check_room(path, settings, missing)  # those of the other processes come onto the same disk
  if len(todo) < len(mine):
    log.info("%s: %d of %d shards are there already", path, len(mine) - len(todo), len(mine))
  encoded, begin = 0, time.monotonic()
  total = sum(len(_range(settings, shard)) for shard in todo)
  with tqdm.tqdm(total=total, desc="encoding", unit="image", disable=None) as bar:
    for done, shard in enumerate(todo, 1):
      encoded += _write_shard(path, source, encode, settings, shard, batch_size, threads, skip_damaged, bar)
      rate = encoded / (time.monotonic() - begin)
      left = datetime.timedelta(seconds=round((total - encoded) / max(rate, 1e-9)))
      log.info("shard %d/%d  images_per_second %.1f  %s left", done, len(todo), rate, left)
  return encoded


def finish(path: str, settings: latents.Settings) -> dict[str, Any]:
  """Writes the manifest, once the shards of all processes are there.

  Raises:
    ValueError: naming the first shard that is not finished.
  """
  for shard in range(settings.shards):
    if not _is_finished(path, settings, shard):
      raise ValueError(f"{os.path.join(path, _name(settings, shard))} is not finished: run the preparation again")
  shards = [read_json(_told(path, settings, shard)) for shard in range(settings.shards)]
  skipped = [name for shard in shards for name in shard["skipped"]]
  records = sum(shard["records"] for shard in shards)
  if not records:
    raise ValueError(f"{path}: all {settings.images} images are damaged, the first: {skipped[0]}")
  manifest = {**settings.to_json(), "records": records, "shards": shards}
  write_json(os.path.join(path, latents.MANIFEST), manifest)
  for shard in range(settings.shards):
    os.remove(_told(path, settings, shard))
  os.remove(os.path.join(path, latents.SETTINGS))
  return manifest


def _begin(path: str, settings: latents.Settings, writes: bool):
  """Tells in the directory what is being made, and refuses a directory of something else."""
  os.makedirs(path, exist_ok=True)
  wanted = settings.to_json()
  for name in (latents.MANIFEST, latents.SETTINGS):
    file = os.path.join(path, name)
    if os.path.exists(file):
      latents.check_same(file, read_json(file), wanted)
      return
  if writes:
    write_json(os.path.join(path, latents.SETTINGS), wanted)


def _write_shard(path, source, encode, settings, shard, batch_size, threads, skip_damaged, bar) -> int:
  """Writes one shard aside, counts its records, renames it, and tells of it. Returns how many there are."""
  file = os.path.join(path, _name(settings, shard))
  partial = f"{file}.partial"
  labels, skipped = [], []
  try:
    with _disk_errors(partial):
      writer = array_record_module.ArrayRecordWriter(partial, "group_size:1,uncompressed")
    try:
      for samples in pipeline.in_order(
        _Guarded(source), _range(settings, shard), batch_size=batch_size, threads=threads
      ):
        damaged = [sample["damaged"] for sample in samples if "damaged" in sample]
        if damaged and not skip_damaged:
          raise ValueError(f"{damaged[0]}. Mend it, or leave such images out with prepare.skip_damaged = True")
        for reason in damaged:
          log.warning("left out: %s", reason)
        skipped += damaged
        whole = [sample for sample in samples if "damaged" not in sample]
        for label, record in _records(whole, encode, settings):
          with _disk_errors(partial):
            writer.write(record)
          labels.append(label)
        bar.update(len(samples))
    finally:
      with _disk_errors(partial):
        writer.close()
    with _disk_errors(partial):
      _check_whole(partial, len(labels))
    told = {"file": os.path.basename(file), "bytes": os.path.getsize(partial), "sha256": latents.checksum(partial)}
    with open(partial, "rb") as written:
      os.fsync(written.fileno())
    os.replace(partial, file)
  finally:
    if os.path.exists(partial):
      os.remove(partial)
  # Labels are one line of text: a JSON list would be a line for each of a million.
  told |= {"records": len(labels), "skipped": skipped, "labels": " ".join(map(str, labels))}
  write_json(_told(path, settings, shard), told)
  return len(labels)


@contextlib.contextmanager
def _disk_errors(file: str) -> Iterator[None]:
  """What ArrayRecord makes of a disk that fails, as the OSError that it is."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(f"{file} cannot be written ({error}); the shards before it are whole, and stay") from error


def _records(samples: list[Sample], encode: Encode, settings: latents.Settings) -> Iterator[tuple[int, bytes]]:
  """(label, record) of each sample, encoded together."""
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
  """A source that answers with the reason in place of a damaged image."""

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


def _told(path: str, settings: latents.Settings, shard: int) -> str:
  return os.path.join(path, f"{_name(settings, shard)}.json")


def _is_finished(path: str, settings: latents.Settings, shard: int) -> bool:
  """Whether the shard is told and of the size that was told."""
  if latents.is_finished(path):
    return True
  file, told = os.path.join(path, _name(settings, shard)), _told(path, settings, shard)
  return os.path.exists(told) and os.path.exists(file) and os.path.getsize(file) == read_json(told)["bytes"]


def _check_room(path: str, settings: latents.Settings, todo: list[int]):
  """Refuses to begin what would fill the disk."""
  needed = settings.record_bytes * sum(len(_range(settings, shard)) for shard in todo)
  space = os.statvfs(path)
  free = space.f_bavail * space.f_frsize
  if needed > free:
    raise ValueError(
      f"{path}: the cache needs {needed / 1e9:.2f} GB more, but the disk has {free / 1e9:.2f} GB: "
      "make room, or give another path"
    )


def _check_whole(file: str, records: int):
  """Reads the end of a shard back: what a full disk cut off is seen here."""
  reader = array_record_module.ArrayRecordReader(file)
  try:
    if reader.num_records() != records:
      raise OSError(f"{file}: {reader.num_records()} of {records} records arrived on the disk")
  finally:
    reader.close()
