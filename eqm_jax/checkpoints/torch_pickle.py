"""Reading and writing PyTorch's .pt files without PyTorch and without running code.

A .pt file is a zip archive: `data.pkl`, a pickle of the objects with tensors replaced by references, and one raw file
per tensor storage. Before PyTorch 1.6 it was a sequence of pickles followed by the storages; that is read too. A pickle
can name any function and have it called: `inert.py` has what stands in for the names.
"""

import collections
import functools
import io
import math
import os
import pickle
import struct
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from eqm_jax.checkpoints import inert

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
  "ComplexFloatStorage": np.dtype("<c8"),
  "ComplexDoubleStorage": np.dtype("<c16"),
}
# Their tensors know the type, or the scale.
OTHER_STORAGES = {
  "UntypedStorage": np.dtype("u1"),
  "QInt8Storage": np.dtype("i1"),
  "QUInt8Storage": np.dtype("u1"),
  "QInt32Storage": np.dtype("<i4"),
}
# Types of tensors in untyped storages, which have no storage of their own.
DTYPES = {
  **{f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")},
  **{
    f"torch.{name}": np.dtype(getattr(ml_dtypes, name))
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
  },
}
MOST_REPEATED = 1 << 24  # numbers of a tensor that repeats those of its storage, which are fewer
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the older format
# Errors of reading a damaged pickle or archive, besides FileError.
DAMAGE = (
  pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, LookupError, TypeError, AttributeError,
  ValueError, OverflowError, MemoryError, RuntimeError, zlib.error,
)  # fmt: skip


class FileError(ValueError):
  """An unreadable file; the message begins with its path."""


class _Fixed:
  """An object whose state a pickle may not set: it could make the reader open another file."""

  def __setstate__(self, state: Any):
    raise pickle.UnpicklingError(f"it sets the state of a {type(self).__name__}")


class Tensor(_Fixed):
  """A tensor in its file, which `numpy()` reads; the numbers of an untyped storage are of `dtype`."""

  resolution = 0.0  # distance of the values that it can have, where that is not relative to the value

  def __init__(
    self, storage: "_Storage", offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: str | None = None
  ):
    integers = all(type(number) is int for number in (offset, *shape, *stride))
    if not isinstance(storage, _Storage) or not integers or len(shape) != len(stride):
      raise pickle.UnpicklingError("a tensor without a storage, or whose shape and stride do not fit")
    self.shape = tuple(shape)
    self._storage = storage
    self._offset = offset
    self._stride = tuple(stride)
    self._dtype = DTYPES.get(dtype, dtype) if dtype else storage.dtype
    if isinstance(self._dtype, np.dtype):
      self._check_extent(storage.length * storage.dtype.itemsize // self._dtype.itemsize)

  def _check_extent(self, stored: int):
    size = math.prod(self.shape)
    last = self._offset + sum((n - 1) * step for n, step in zip(self.shape, self._stride))
    if min((self._offset, *self._stride, *self.shape)) < 0 or (last >= stored if size else self._offset > stored):
      raise FileError(f"{self._storage.path}: a tensor of shape {self.shape} reaches outside its storage: damaged file")
    if size > max(stored, MOST_REPEATED):
      raise FileError(f"{self._storage.path}: a tensor of shape {self.shape} has {stored} numbers only: damaged file")

  def numpy(self) -> np.ndarray:
    if not isinstance(self._dtype, np.dtype):
      raise FileError(f"{self._storage.path}: a tensor of {self._dtype}, which is not supported: save it as float32")
    size = self._dtype.itemsize
    strides = [step * size for step in self._stride]
    return np.ndarray(self.shape, self._dtype, self._storage.read(), self._offset * size, strides).copy()


class QuantizedTensor(Tensor):
  """A tensor of (integer − zero point) × scale, for all numbers or one for each index of `axis`."""

  def __init__(self, *arguments: Any, quantizer: tuple):
    super().__init__(*arguments)
    _, self._scale, self._zero, *axis = quantizer
    self._axis = axis[0] if axis else None

  @property
  def resolution(self) -> float:
    return float(np.max(self._numbers(self._scale)))

  def numpy(self) -> np.ndarray:
    integers = super().numpy().astype(np.float32)
    scale, zero = self._numbers(self._scale), self._numbers(self._zero)
    if self._axis is not None:
      per_index = [-1 if axis == self._axis else 1 for axis in range(integers.ndim)]
      scale, zero = scale.reshape(per_index), zero.reshape(per_index)
    return (integers - zero) * scale

  @staticmethod
  def _numbers(value: Any) -> np.ndarray:
    return np.asarray(value.numpy() if isinstance(value, Tensor | inert.Array) else value, np.float32)


class _Storage(_Fixed):
  """The numbers of one storage.

  `place` is their entry in the archive; in the older format where they begin, which is known once the pickles are read.
  """

  def __init__(self, path: str, place: str | int | None, dtype: np.dtype, length: int, reader: Callable):
    self.path = path
    self.place = place
    self.dtype = dtype
    self.length = length
    self._reader = reader

  def read(self) -> np.ndarray:
    return self._reader(self.path, self.place, self.dtype, self.length)


def _read_entry(path: str, entry: str, dtype: np.dtype, _: int) -> np.ndarray:
  try:
    with zipfile.ZipFile(path) as archive:
      return np.frombuffer(archive.read(entry), dtype)
  except DAMAGE as error:
    raise FileError(f"{path}: cannot read {entry} ({error}): damaged, fetch it again") from error


def _read_at(path: str, position: int, dtype: np.dtype, length: int) -> np.ndarray:
  with open(path, "rb") as file:
    file.seek(position)
    flat = np.fromfile(file, dtype, length)
  if flat.size != length:
    raise FileError(f"{path}: ends inside a tensor: was it changed while it was read?")
  return flat


def read(path: str | os.PathLike) -> Any:
  """The objects of a .pt file: dicts, lists and numbers as they are, tensors as `Tensor`, others as `inert.Inert`.

  Raises:
    ValueError: if the file is truncated, in neither of PyTorch's formats (zip since version 1.6, a sequence of pickles
      since 0.4), or asks for something that could run code.
  """
  path = os.fspath(path)
  with open(path, "rb") as file:
    legacy = LEGACY_MAGIC.to_bytes(10, "little") in file.read(32)
  try:
    return _read_legacy(path) if legacy else _read_zip(path)
  except FileError:
    raise
  except inert.Refused as name:
    raise FileError(
      f"{path}: refused, the file asks for {name}, which could run code: a checkpoint of weights needs none, save the "
      "state dict alone"
    ) from None
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
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
  reader = functools.lru_cache(maxsize=1)(_read_entry)  # neighbours may lie in one storage

  def find(dtype: np.dtype, key: str, length: int) -> _Storage:
    entry = f"{prefix}data/{key}"
    if sizes.get(entry, 0) != length * dtype.itemsize:
      raise FileError(
        f"{path}: {entry} has {sizes.get(entry, 0)} bytes, not those of {length} {dtype}: damaged, fetch it again"
      )
    return _Storage(path, entry, dtype, length, reader)

  return _Unpickler(data, path, find).load()


def _read_legacy(path: str) -> Any:
  """Pickles of magic, version, system, objects and keys; then the length and the numbers of each key's storage."""
  storages: dict[str, _Storage] = {}
  reader = functools.lru_cache(maxsize=1)(_read_at)

  def find(dtype: np.dtype, key: str, length: int) -> _Storage:
    storage = storages.setdefault(key, _Storage(path, None, dtype, length, reader))
    if (storage.dtype, storage.length) != (dtype, length):
      raise FileError(f"{path}: storage {key} is {storage.length} {storage.dtype} and {length} {dtype}: damaged file")
    return storage

  with open(path, "rb") as file:
    magic, version, system = (_Unpickler(file, path, find).load() for _ in range(3))
    if (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION):
      found = version if isinstance(version, int) else "unknown"
      raise FileError(
        f"{path}: version {found} of the format before PyTorch 1.6, but only {LEGACY_VERSION} is supported"
      )
    if not system["little_endian"]:
      raise FileError(f"{path}: big-endian files are not supported: save it on another machine")
    contents, keys = (_Unpickler(file, path, find).load() for _ in range(2))
    if sorted(keys) != sorted(storages):
      raise FileError(f"{path}: its objects name {len(storages)} storages, its list {len(keys)}: damaged file")
    for storage in map(storages.get, keys):
      _locate(storage, file)
  return contents


def _locate(storage: _Storage, file: BinaryIO):
  """Records where the numbers of the next storage begin, and skips them."""
  (length,) = struct.unpack("<q", file.read(8))
  if length != storage.length or length < 0:
    raise FileError(f"{storage.path}: a storage of {storage.length} numbers holds {length}: damaged file")
  storage.place = file.tell()
  end = storage.place + length * storage.dtype.itemsize
  if end > os.path.getsize(storage.path):
    raise EOFError(f"its numbers end at byte {end:,} or later")
  file.seek(end)


class _Unpickler(pickle._Unpickler):
  """Calls `storage(dtype, key, length)` for each reference to one.

  The reader in Python, not the one in C: it allocates no more places for objects than a file fills.
  """

  def __init__(self, file: BinaryIO, path: str, storage: Callable[[np.dtype, str, int], Any]):
    super().__init__(types.SimpleNamespace(read=file.read, readline=functools.partial(_read_line, file)))
    self.path, self.storage = path, storage
    self.stand_ins: dict[tuple[str, str], type] = {}
    self.functions = {
      "torch._tensor._rebuild_from_type_v2": self.rebuild_subclass,
      "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
      "torch._utils._rebuild_device_tensor_from_numpy": _first,
      "torch._utils._rebuild_parameter": _first,
      "torch._utils._rebuild_parameter_with_state": _first,
      "torch._utils._rebuild_qtensor": _rebuild_quantized,
      "torch._utils._rebuild_tensor": _rebuild_tensor,
      "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
      "torch._utils._rebuild_tensor_v3": _rebuild_untyped,
      "torch._utils._rebuild_wrapper_subclass": inert.Inert,
      "torch._utils._rebuild_xla_tensor": _first,
    }

  def load_bytearray8(self):
    """The opcode without its allocation of as many bytes as the file says."""
    self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

  dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) not in self.stand_ins:
      self.stand_ins[module, name] = inert.stand_in(module, name, self.functions)
    return self.stand_ins[module, name]

  def rebuild_subclass(self, function: Callable, kind: type, arguments: tuple, state: Any) -> Any:
    """A tensor with attributes, or a wrapper around the local part of a sharded one, which may be the whole."""
    result = function(*arguments)
    if isinstance(result, inert.Inert):
      result = inert.Inert.__new__(kind, *arguments)
      result.__setstate__(state)
      local, size = vars(result).get("_local_tensor"), arguments[2] if len(arguments) > 2 else None
      if isinstance(local, Tensor) and local.shape == tuple(size):
        return local
    return result

  def persistent_load(self, reference: tuple) -> Any:
    if reference[0] == "module":  # the older format's classes of modules, with their source
      return reference[1]
    kind, storage, key, _, length, *view = reference
    module, _, name = getattr(storage, "__name__", "").rpartition(".")
    dtype = STORAGES.get(name, OTHER_STORAGES.get(name))
    known = kind == "storage" and module in ("torch", "torch.cuda", "torch.storage") and dtype is not None
    # Views of storages: PyTorch 0.3 and earlier.
    if not known or any(view) or not isinstance(key, str) or type(length) is not int:
      raise FileError(f"{self.path}: not a reference to a storage: damaged, or of PyTorch 0.3 and earlier")
    return self.storage(dtype, key, length)


def _read_line(file: BinaryIO) -> bytes:
  line = file.readline()
  if not line.endswith(b"\n"):
    raise EOFError("ends inside a name")
  return line


def _first(data: Any, *_: Any) -> Any:
  return data


def _rebuild_tensor(storage: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
  return Tensor(storage, offset, shape, stride)


def _rebuild_untyped(storage: Any, offset: int, shape: tuple, stride: tuple, *rest: Any) -> Tensor:
  return Tensor(storage, offset, shape, stride, rest[2].__name__)  # requires_grad, hooks, dtype


def _rebuild_quantized(storage: Any, offset: int, shape: tuple, stride: tuple, *rest: Any) -> Tensor:
  return QuantizedTensor(storage, offset, shape, stride, quantizer=rest[0])


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
