"""Reads and writes PyTorch's .pt files without PyTorch and without running code.

A .pt file is a zip archive: `data.pkl`, a pickle of the objects with tensors
replaced by references, and one raw file per tensor storage. A pickle can name any
function and have it called, so the reader resolves a short list of names to inert
stand-ins of its own and refuses every other by name.
"""

import collections
import io
import math
import os
import pickle
import struct
import types
import zipfile
from collections.abc import Mapping
from typing import Any

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


class Tensor:
  """A tensor still in its file; `numpy()` reads it. Optimizer states never are."""

  def __init__(self, storage: "_Storage", offset: int, shape: tuple[int, ...], stride: tuple[int, ...]):
    self.shape = tuple(shape)
    self._storage, self._offset, self._stride = storage, offset, tuple(stride)

  def numpy(self) -> np.ndarray:
    flat = self._storage.read()
    last = self._offset + sum((n - 1) * step for n, step in zip(self.shape, self._stride))
    if min((self._offset, *self._stride, *self.shape)) < 0 or (math.prod(self.shape) and last >= flat.size):
      raise ValueError(
        f"{self._storage.path}: a tensor of shape {self.shape} reaches outside its storage: damaged file"
      )
    strides = [step * flat.itemsize for step in self._stride]
    return np.lib.stride_tricks.as_strided(flat[self._offset :], self.shape, strides).copy()


class _Storage:
  def __init__(self, path: str, entry: str, dtype: np.dtype):
    self.path, self.entry, self.dtype = path, entry, dtype

  def read(self) -> np.ndarray:
    try:
      with zipfile.ZipFile(self.path) as archive:
        return np.frombuffer(archive.read(self.entry), self.dtype)
    except (KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
      raise ValueError(f"{self.path}: cannot read {self.entry}, the file is damaged ({error})") from error


def read(path: str | os.PathLike) -> Any:
  """The objects of a .pt file: dicts, lists and numbers as they are, tensors as `Tensor`.

  Raises:
    ValueError: if the file is truncated, not in the zip format of PyTorch 1.6 and
      later, or names anything but tensors and plain containers.
  """
  path = os.fspath(path)
  try:
    with zipfile.ZipFile(path) as archive:
      pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
      if not pickles:
        raise ValueError(f"{path}: a zip archive, but not a PyTorch file (no data.pkl)")
      prefix = pickles[0].removesuffix("data.pkl")
      if prefix + "byteorder" in archive.namelist() and archive.read(prefix + "byteorder") != b"little":
        raise ValueError(f"{path}: big-endian files are not supported")
      return _Unpickler(archive.read(pickles[0]), path, prefix).load()
  except zipfile.BadZipFile as error:
    size = os.path.getsize(path)
    raise ValueError(
      f"{path} ({size:,} bytes) is truncated, or not a PyTorch file of version 1.6 or later: "
      "compare its size with the source's and fetch it again"
    ) from error
  except (pickle.UnpicklingError, EOFError, IndexError, TypeError, AttributeError, struct.error) as error:
    raise ValueError(f"{path}: not readable as a PyTorch file: {error}") from error


class _Namespace(types.SimpleNamespace):
  """Stands in for argparse.Namespace: holds attributes, does nothing."""


class _Unpickler(pickle.Unpickler):
  def __init__(self, data: bytes, path: str, prefix: str):
    super().__init__(io.BytesIO(data))
    self.path, self.prefix = path, prefix

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in STORAGES:
      return STORAGES[name]
    allowed = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("argparse", "Namespace"): _Namespace,
      ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, stride, *_: Tensor(
        storage, offset, shape, stride
      ),
      ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    }
    if (module, name) not in allowed:
      raise ValueError(
        f"{self.path}: refused, the file asks for {module}.{name}, "
        "which a checkpoint of weights has no use for and which could run code"
      )
    return allowed[module, name]

  def persistent_load(self, reference: tuple) -> _Storage:
    _, dtype, key, *_ = reference
    if not isinstance(dtype, np.dtype):
      raise ValueError(f"{self.path}: unknown storage type {dtype!r}")
    return _Storage(self.path, f"{self.prefix}data/{key}", dtype)


def write(path: str | os.PathLike, tensors: Mapping[str, Mapping[str, np.ndarray]], args: Mapping[str, Any]):
  """Writes state dicts so that `torch.load` reads them.

  Args:
    path: the file; written beside and renamed, so an existing file stays whole
      until the new one is.
    tensors: {"ema": {name: float32 array}, ...}; an array in several dicts is
      stored once.
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
