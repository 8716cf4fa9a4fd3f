"""Reading and writing PyTorch's .pt files without PyTorch and without running code.

A .pt file is a zip archive: `data.pkl`, a pickle of the objects with tensors replaced by references, and one raw file
per tensor storage. Before PyTorch 1.6 it was a sequence of pickles followed by the storages; that is read too. A pickle
can name any function and have it called, so the reader resolves a short list of names to inert stand-ins and refuses
every other by name.
"""

import collections
import io
import math
import os
import pickle
import struct
import types
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

STORAGES = {
  "DoubleStorage": np.dtype("<f8"),
  "FloatStorage": np.dtype("<f4"),
  "HalfStorage": np.dtype("<f2"),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype("<i8"),
  "IntStorage": np.dtype("<i4"),
  "ShortStorage": np.dtype("<i2"),
  "CharStorage": np.dtype("i1"),
  "ByteStorage": np.dtype("u1"),
  "BoolStorage": np.dtype("?"),
}
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the older format
# Errors of reading a damaged pickle or archive, besides FileError.
DAMAGE = (
  pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, LookupError, TypeError, AttributeError,
  ValueError, OverflowError, MemoryError, RuntimeError,
)  # fmt: skip


class FileError(ValueError):
  """An unreadable file; the message begins with its path."""


class _Inert:
  """An object whose state a pickle may not set: it could make the reader open another file."""

  def __setstate__(self, state: Any):
    raise pickle.UnpicklingError(f"it sets the state of a {type(self).__name__}")


class Tensor(_Inert):
  """A tensor in its file, which `numpy()` reads."""

  def __init__(
    self, storage: "_Storage | _LegacyStorage", offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
  ):
    self.shape = tuple(shape)
    self._storage = storage
    self._offset = offset
    self._stride = tuple(stride)

  def numpy(self) -> np.ndarray:
    flat = self._storage.read()
    last = self._offset + sum((n - 1) * step for n, step in zip(self.shape, self._stride))
    if min((self._offset, *self._stride, *self.shape)) < 0 or (math.prod(self.shape) and last >= flat.size):
      raise FileError(f"{self._storage.path}: a tensor of shape {self.shape} reaches outside its storage: damaged file")
    strides = [step * flat.itemsize for step in self._stride]
    return np.lib.stride_tricks.as_strided(flat[self._offset :], self.shape, strides).copy()


class _Storage(_Inert):
  """The numbers of one storage: an entry of a zip archive."""

  def __init__(self, path: str, entry: str, dtype: np.dtype):
    self.path = path
    self.entry = entry
    self.dtype = dtype

  def read(self) -> np.ndarray:
    try:
      with zipfile.ZipFile(self.path) as archive:
        return np.frombuffer(archive.read(self.entry), self.dtype)
    except DAMAGE as error:
      raise FileError(f"{self.path}: cannot read {self.entry} ({error}): damaged, fetch it again") from error


class _LegacyStorage(_Inert):
  """A storage in the older format: `length` numbers at `position`, which is known once the pickles are read."""

  def __init__(self, path: str, dtype: np.dtype, length: int):
    self.path = path
    self.dtype = dtype
    self.length = length
    self.position = None

  def read(self) -> np.ndarray:
    with open(self.path, "rb") as file:
      file.seek(self.position)
      flat = np.fromfile(file, self.dtype, self.length)
    if flat.size != self.length:
      raise FileError(f"{self.path}: ends inside a tensor: was it changed while it was read?")
    return flat


def read(path: str | os.PathLike) -> Any:
  """The objects of a .pt file: dicts, lists and numbers as they are, tensors as `Tensor`.

  Raises:
    ValueError: if the file is truncated, in neither of PyTorch's formats (zip since version 1.6, a sequence of pickles
      since 0.4), or names anything but tensors and plain containers.
  """
  path = os.fspath(path)
  with open(path, "rb") as file:
    legacy = LEGACY_MAGIC.to_bytes(10, "little") in file.read(32)
  try:
    return _read_legacy(path) if legacy else _read_zip(path)
  except FileError:
    raise
  except zipfile.BadZipFile as error:
    raise FileError(_truncated(path, "is truncated, or not a PyTorch file")) from error
  except DAMAGE as error:
    reason = f"{type(error).__name__}: {error}"
    if legacy:
      raise FileError(_truncated(path, f"is truncated or damaged ({reason})")) from error
    raise FileError(f"{path}: not readable as a PyTorch file: {reason}") from error


def _truncated(path: str, problem: str) -> str:
  return f"{path} ({os.path.getsize(path):,} bytes) {problem}: compare its size with the source's and fetch it again"


def _read_zip(path: str) -> Any:
  with zipfile.ZipFile(path) as archive:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if not pickles:
      raise FileError(f"{path}: a zip archive, but not a PyTorch file (no data.pkl)")
    prefix = pickles[0].removesuffix("data.pkl")
    if prefix + "byteorder" in archive.namelist() and archive.read(prefix + "byteorder") != b"little":
      raise FileError(f"{path}: big-endian files are not supported: save it on another machine")
    data = io.BytesIO(archive.read(pickles[0]))
  return _Unpickler(data, path, lambda dtype, key, _: _Storage(path, f"{prefix}data/{key}", dtype)).load()


def _read_legacy(path: str) -> Any:
  """Pickles of magic, version, system, objects and keys; then the length and the numbers of each key's storage."""
  storages: dict[str, _LegacyStorage] = {}

  def find(dtype: np.dtype, key: str, length: int) -> _LegacyStorage:
    storage = storages.setdefault(key, _LegacyStorage(path, dtype, length))
    if (storage.dtype, storage.length) != (dtype, length):
      raise FileError(f"{path}: storage {key} is {storage.length} {storage.dtype} and {length} {dtype}: damaged file")
    return storage

  with open(path, "rb") as file:
    magic, version, system = (_Unpickler(file, path, find).load() for _ in range(3))
    if (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION):
      raise FileError(
        f"{path}: version {version!r} of the format before PyTorch 1.6, but only {LEGACY_VERSION} is supported"
      )
    if not system["little_endian"]:
      raise FileError(f"{path}: big-endian files are not supported: save it on another machine")
    contents, keys = (_Unpickler(file, path, find).load() for _ in range(2))
    if sorted(keys) != sorted(storages):
      raise FileError(f"{path}: its objects name {len(storages)} storages, its list {len(keys)}: damaged file")
    for storage in map(storages.get, keys):
      _locate(storage, file)
  return contents


def _locate(storage: _LegacyStorage, file: BinaryIO):
  """Records where the numbers of the next storage begin, and skips them."""
  (length,) = struct.unpack("<q", file.read(8))
  if length != storage.length or length < 0:
    raise FileError(f"{storage.path}: a storage of {storage.length} numbers holds {length}: damaged file")
  storage.position = file.tell()
  end = storage.position + length * storage.dtype.itemsize
  if end > os.path.getsize(storage.path):
    raise EOFError(f"its numbers end at byte {end:,} or later")
  file.seek(end)


class _Namespace(types.SimpleNamespace):
  """Stands in for argparse.Namespace: holds attributes, does nothing."""


class _Unpickler(pickle.Unpickler):
  """Calls `storage(dtype, key, length)` for each reference to one."""

  def __init__(self, file: BinaryIO, path: str, storage: Callable[[np.dtype, str, int], Any]):
    super().__init__(file)
    self.path, self.storage = path, storage

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in STORAGES:
      return name
    allowed = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("argparse", "Namespace"): _Namespace,
      ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
      ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    }
    if (module, name) not in allowed:
      raise FileError(
        f"{self.path}: refused, the file asks for {module}.{name}, which could run code: a checkpoint of weights "
        "needs none, save the state dict alone"
      )
    return allowed[module, name]

  def rebuild_tensor(self, storage: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_) -> Tensor:
    integers = all(type(number) is int for number in (offset, *shape, *stride))
    if not isinstance(storage, _Storage | _LegacyStorage) or not integers or len(shape) != len(stride):
      raise FileError(f"{self.path}: a tensor of shape {shape!r} and stride {stride!r}: damaged file")
    return Tensor(storage, offset, shape, stride)

  def persistent_load(self, reference: tuple) -> Any:
    kind, name, key, _, length, *view = reference
    if kind != "storage" or name not in STORAGES or any(view):  # views of storages: PyTorch 0.3 and earlier
      raise FileError(f"{self.path}: not a reference to a storage: {reference!r}")
    return self.storage(STORAGES[name], key, length)


def write(path: str | os.PathLike, tensors: Mapping[str, Mapping[str, np.ndarray]], args: Mapping[str, Any]):
  """Writes state dicts so that `torch.load` reads them.

  Args:
    path: the file; written under another name and renamed, so an existing file stays until the new one is complete.
    tensors: {"ema": {name: float32 array}, ...}; an array in several dicts is stored once.
    args: strings, numbers and booleans, read back as an argparse.Namespace.
  """
  path = os.fspath(path)
  partial = path + ".partial"
  try:
    _write(partial, tensors, args)
    os.replace(partial, path)
  finally:
    if os.path.exists(partial):
      os.remove(partial)


def _write(path: str, tensors: Mapping[str, Mapping[str, np.ndarray]], args: Mapping[str, Any]):
  keys: dict[int, int] = {}  # id of an array → number of its storage
  body = bytearray(b"\x80\x02}(")  # protocol 2, an empty dict, mark
  with zipfile.ZipFile(path, "w") as archive:
    for title, state in tensors.items():
      body += _pickle(title) + b"ccollections\nOrderedDict\n)R("
      for name, array in state.items():
        if id(array) not in keys:
          keys[id(array)] = len(keys)
          archive.writestr(f"archive/data/{keys[id(array)]}", np.ascontiguousarray(array, "<f4").tobytes())
        body += _pickle(name) + _pickle_tensor(array.shape, keys[id(array)])
      body += b"u"
    body += _pickle("args") + b"cargparse\nNamespace\n)\x81}("
    for name, value in args.items():
      body += _pickle(name) + _pickle(value)
    body += b"ubu."  # set the items, build the namespace, set the outer items, stop
    archive.writestr("archive/data.pkl", bytes(body))
    archive.writestr("archive/byteorder", "little")
    archive.writestr("archive/version", "3\n")


def _pickle(value: str | int | float | bool | None) -> bytes:
  """The opcodes that push one plain value, without header, memo and stop."""
  if isinstance(value, str):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded
  if isinstance(value, bool) or value is None:
    return {True: b"\x88", False: b"\x89", None: b"N"}[value]
  if isinstance(value, float):
    return b"G" + struct.pack(">d", value)
  length = value.bit_length() // 8 + 1
  return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


def _pickle_tensor(shape: tuple[int, ...], key: int) -> bytes:
  """_rebuild_tensor_v2(storage, offset 0, shape, stride, requires_grad, hooks)."""
  size = math.prod(shape)
  strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
  storage = (
    b"(" + _pickle("storage") + b"ctorch\nFloatStorage\n" + _pickle(str(key)) + _pickle("cpu") + _pickle(size) + b"tQ"
  )
  as_tuple = [b"(" + b"".join(map(_pickle, values)) + b"t" for values in (shape, strides)]
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage
    + _pickle(0)
    + b"".join(as_tuple)
    + _pickle(False)
    + b"ccollections\nOrderedDict\n)RtR"
  )
