"""What is known of a long series of samples, unit by unit on disk: a killed evaluation goes on after the last one.

Every process of a run writes its units into the same directory; which units there are does not depend on how many
processes or devices there are, so a series may be finished by others than began it.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import zipfile
import zlib
from typing import Any

import numpy as np

from eqm_jax import devices
from eqm_jax.files import whole, write_json

SETTINGS = "settings.json"
POLL_SECONDS = 0.5

log = logging.getLogger(__name__)


class Parts:
  """The units of one series."""

  def __init__(self, directory: str, name: str, about: dict[str, Any], count: int, size: int):
    """Opens the series, or begins it.

    Args:
      directory: of all series.
      name: of this one.
      about: all that its arrays depend on: a series with other settings lies elsewhere.
      count: of samples.
      size: of a unit.
    """
    about = {**about, "samples": count, "unit": size}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    self.directory, self.count, self.size = os.path.join(directory, f"{name}-{digest[:12]}"), count, size
    os.makedirs(self.directory, exist_ok=True)
    if devices.process()[0] == 0:
      write_json(os.path.join(self.directory, SETTINGS), about)

  @property
  def numbers(self) -> range:
    """The units."""
    return range(-(-self.count // self.size))

  def own(self) -> range:
    """The units that are this process's to make: every n-th of all."""
    process, processes = devices.process()
    return self.numbers[process::processes]

  def missing(self) -> list[int]:
    """Those of its own that are not there yet."""
    return [number for number in self.own() if not os.path.exists(self._file(number))]

  def write(self, number: int, arrays: dict[str, np.ndarray]):
    """Writes one unit, whole or not at all."""
    with whole(self._file(number)) as file:
      np.savez(file, **arrays)

  def wait(self, seconds: float):
    """Returns when all units are there, whichever process makes them.

    Raises:
      ValueError: if they are not after this time.
    """
    end = time.monotonic() + seconds
    while not all(os.path.exists(self._file(number)) for number in self.numbers):
      if time.monotonic() > end:
        raise ValueError(
          f"{self.directory}: units of other processes are not there after {seconds:.0f} s: "
          "the workdir must be on a disk that all processes share"
        )
      time.sleep(POLL_SECONDS)

  def read(self, name: str, number: int) -> np.ndarray:
    """One array of one unit.

    Raises:
      ValueError: naming the file, if it is damaged.
    """
    try:
      with np.load(self._file(number)) as arrays:
        return arrays[name]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
      raise ValueError(
        f"{self._file(number)}: damaged ({error}). Remove it, and the evaluation makes that unit anew"
      ) from error

  def array(self, name: str) -> np.ndarray:
    """An array of all units together."""
    return np.concatenate([self.read(name, number) for number in self.numbers])

  def names(self) -> list[str]:
    """The arrays that a unit has."""
    with np.load(self._file(0)) as arrays:
      return list(arrays)

  def remove(self):
    """Deletes the units: what they were made for is done."""
    shutil.rmtree(self.directory, ignore_errors=True)

  def write_images(self, path: str, label_N: np.ndarray):
    """Writes the images of all units as ADM's evaluator reads them: an .npz with arr_0 [N, H, W, 3] uint8.

    Unit by unit, so that 50,000 images need no more memory than a unit; arr_1 are the labels.
    """
    first = self.read("image", 0)
    with whole(path) as target, zipfile.ZipFile(target, "w", allowZip64=True) as archive:
      with archive.open("arr_0.npy", "w", force_zip64=True) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *first.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        for number in self.numbers:
          file.write(np.ascontiguousarray(self.read("image", number)).tobytes())
      with archive.open("arr_1.npy", "w") as file:
        np.lib.format.write_array(file, label_N)

  def _file(self, number: int) -> str:
    return os.path.join(self.directory, f"{number:06d}.npz")
