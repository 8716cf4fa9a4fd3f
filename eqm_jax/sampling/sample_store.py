"""A large sample set on disk, chunk by chunk: a killed evaluation goes on after the last finished chunk.

Every process of a run writes its chunks into the same directory. The chunks do not depend on the number of processes
or devices, so a sample set may be finished by other ones than began it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from eqm_jax import distributed
from eqm_jax.io import atomic_write, write_json

SETTINGS = "settings.json"
POLL_SECONDS = 0.5


class SampleStore:
  """The chunks of one sample set."""

  def __init__(self, directory: str, name: str, settings: dict[str, Any], num_samples: int, chunk_size: int):
    """Opens the sample set, or begins it.

    Args:
      directory: of all sample sets.
      name: of this one.
      settings: everything that its arrays depend on: a sample set with other settings has another directory.
      num_samples: in all chunks.
      chunk_size: samples in a chunk.
    """
    settings = {**settings, "samples": num_samples, "chunk_size": chunk_size}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    self.directory = os.path.join(directory, f"{name}-{digest[:12]}")
    self.num_samples, self.chunk_size = num_samples, chunk_size
    os.makedirs(self.directory, exist_ok=True)
    if distributed.process_index_and_count()[0] == 0:
      write_json(os.path.join(self.directory, SETTINGS), settings)

  @property
  def numbers(self) -> range:
    """Numbers of all chunks."""
    return range(-(-self.num_samples // self.chunk_size))

  def own(self) -> range:
    """Numbers of the chunks that this process samples: every n-th."""
    index, count = distributed.process_index_and_count()
    return self.numbers[index::count]

  def missing(self) -> list[int]:
    """Numbers of this process's chunks that are not on disk yet."""
    return [number for number in self.own() if not os.path.exists(self._file(number))]

  def write(self, number: int, arrays: dict[str, np.ndarray]):
    """Writes one chunk, completely or not at all."""
    with atomic_write(self._file(number)) as file:
      np.savez(file, **arrays)

  def wait(self, seconds: float):
    """Returns when all chunks are on disk, whichever process samples them.

    Raises:
      ValueError: if they are not after this time.
    """
    end = time.monotonic() + seconds
    while not all(os.path.exists(self._file(number)) for number in self.numbers):
      if time.monotonic() > end:
        raise ValueError(
          f"{self.directory}: chunks of other processes are still missing after {seconds:.0f} s; put the workdir on a "
          "disk that all processes share"
        )
      time.sleep(POLL_SECONDS)

  def read(self, name: str, number: int) -> np.ndarray:
    """One array of one chunk.

    Raises:
      ValueError: naming the file, if it is damaged.
    """
    with self._opened(number) as arrays:
      return arrays[name]

  def array(self, name: str) -> np.ndarray:
    """One array of all chunks."""
    return np.concatenate([self.read(name, number) for number in self.numbers])

  def names(self) -> list[str]:
    """Names of the arrays that a chunk has.

    Raises:
      ValueError: naming the file, if it is damaged.
    """
    with self._opened(0) as arrays:
      return list(arrays)

  @contextlib.contextmanager
  def _opened(self, number: int) -> Iterator[Mapping[str, np.ndarray]]:
    try:
      with np.load(self._file(number)) as arrays:
        yield arrays
    except (OSError, EOFError, KeyError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
      raise ValueError(
        f"{self._file(number)}: damaged ({error}). Remove the file, and the evaluation samples this chunk again"
      ) from error

  def remove(self):
    """Deletes the chunks, once the results that need them are written."""
    shutil.rmtree(self.directory, ignore_errors=True)

  def write_images(self, path: str, labels: np.ndarray):
    """Writes all images as ADM's evaluator reads them: an .npz with arr_0 [N, H, W, 3] uint8, and the labels as arr_1.

    Chunk by chunk, so that 50,000 images need no more memory than one chunk.
    """
    first = self.read("image", 0)
    with atomic_write(path) as target, zipfile.ZipFile(target, "w", allowZip64=True) as archive:
      with archive.open("arr_0.npy", "w", force_zip64=True) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_samples, *first.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        for number in self.numbers:
          file.write(np.ascontiguousarray(self.read("image", number)).tobytes())
      with archive.open("arr_1.npy", "w") as file:
        np.lib.format.write_array(file, labels)

  def _file(self, number: int) -> str:
    return os.path.join(self.directory, f"{number:06d}.npz")
