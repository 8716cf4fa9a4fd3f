"""Inert types in place of those that a pickle names; their instances record arguments and state.

A pickle can name any function and have it called. Here no name leads to code outside this package: a class becomes a
type of the same name that only keeps what it is given, as a training script's own classes need. A function that is not
known to build plain data is refused by name, and so is everything of Python's library but the plain data types below.
"""

import _compat_pickle
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Module → names that build plain data.
PLAIN = {
  "argparse": "Namespace",
  "array": "array _array_reconstructor",
  "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple type",
  "collections": "ChainMap Counter OrderedDict UserDict UserList UserString defaultdict deque",
  "datetime": "date datetime time timedelta timezone",
  "decimal": "Decimal",
  "fractions": "Fraction",
  "logging": "Logger getLogger",
  "numpy": "dtype matrix ndarray",
  "numpy._core.multiarray": "_reconstruct scalar",
  "numpy._core.numeric": "_frombuffer",
  "numpy.ma.core": "_mareconstruct",
  "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
  "numpy.random.bit_generator": "__pyx_unpickle_SeedSequence",
  "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
  "random": "Random",
  "re": "_compile",
  "torch": "device",
  "torch._utils": "_rebuild_meta_tensor_no_storage _rebuild_nested_tensor _rebuild_sparse_csr_tensor "
  "_rebuild_sparse_tensor",
  "torch.nested._internal.nested_tensor": "_rebuild_njt",
  "torch.serialization": "_get_layout",
  "traceback": "FrameSummary StackSummary",
  "types": "SimpleNamespace",
  "uuid": "SafeUUID UUID",
}
PLAIN = {f"{module}.{name}" for module, names in PLAIN.items() for name in names.split()}
NUMBERS = re.compile(r"[biufc]\d+")  # numpy's codes of types without objects


class Refused(Exception):
  """A pickle asks for something that could run code; the message is its name."""


class _Kind(type):
  """The type of stand-ins. A pickle may neither change one nor call it, unless it stands for a type of data."""

  def __call__(cls, *arguments: Any) -> Any:
    if cls.function is not None:
      return cls.function(*arguments)
    if not cls.is_data:
      raise Refused(cls.__name__)
    return cls.__new__(cls, *arguments)

  def __setattr__(cls, name: str, value: Any):
    raise Refused(f"{cls.__name__}.{name}")


class Inert(metaclass=_Kind):
  """An object of a file: `vars()` holds its attributes. Subclasses are made by `stand_in`, one for each name."""

  __slots__ = ("__dict__", "arguments", "items", "state")
  function = None  # called in place of the type
  is_data = True

  def __new__(cls, *arguments: Any, **_: Any):
    self = object.__new__(cls)
    self.arguments, self.items, self.state = arguments, {}, None
    return self

  def __setstate__(self, state: Any):
    self.state = state
    for part in state if isinstance(state, tuple) else (state,):  # attributes, or attributes and slots
      if isinstance(part, dict):
        self.__dict__.update(part)

  def __setitem__(self, key: Any, value: Any):
    self.items[key] = value

  def append(self, item: Any):
    self.items[len(self.items)] = item

  add = append

  def extend(self, items: list):
    self.items.update(enumerate(items, len(self.items)))

  def __repr__(self) -> str:
    return f"<{type(self).__name__}>"


class Array(Inert):
  """An array of numpy; `numpy()` reads one of numbers."""

  __slots__ = ("flat", "order", "shape")

  def __new__(cls, *arguments: Any):
    self = super().__new__(cls, *arguments)
    self.flat = None
    return self

  def __setstate__(self, state: tuple):
    _, shape, dtype, fortran, data = state
    self._set(data, dtype, shape, "F" if fortran else "C")

  def _set(self, data: Any, dtype: Any, shape: tuple[int, ...], order: str):
    if _number_type(dtype) and isinstance(data, bytes | bytearray):
      self.flat = np.frombuffer(data, _number_type(dtype))
      self.shape, self.order = self.flat.reshape(shape).shape, order

  def numpy(self) -> np.ndarray:
    if self.flat is None:
      raise ValueError("an array of Python objects, not of numbers")
    return self.flat.reshape(self.shape, order=self.order).copy()


def stand_in(module: str, name: str, functions: Mapping[str, Callable]) -> type:
  """The type that stands for a name of a pickle.

  Args:
    module, name: as the pickle has them.
    functions: {"module.name": called in its place}, besides the ones here.

  Raises:
    Refused: if it is part of Python's library and not a type of plain data.
  """
  module, name = _current_name(module, name)
  full = f"{module}.{name}"
  function = functions.get(full) or FUNCTIONS.get(full)
  # By convention a class has a capital letter: enumerations and exceptions are built by a call of their class.
  is_class = name.split(".")[-1].lstrip("_")[:1].isupper()
  is_data = full in PLAIN or is_class and (module == "builtins" or not _is_standard(module, name))
  if not is_data and function is None and _is_standard(module, name):
    raise Refused(full)
  return _Kind(full, (Inert,), {"__slots__": (), "function": function and staticmethod(function), "is_data": is_data})


def _current_name(module: str, name: str) -> tuple[str, str]:
  """A name by which newer versions have it: protocol 2, PyTorch's own, writes the names of Python 2."""
  module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
  module = _compat_pickle.IMPORT_MAPPING.get(module, module)
  if module == "pathlib._local":  # Python 3.13
    module = "pathlib"
  if module.startswith("numpy.core"):  # numpy 1
    module = module.replace("numpy.core", "numpy._core", 1)
  return module, name


def _is_standard(module: str, name: str) -> bool:
  """Whether a name is in Python's library, be it by way of a module that imports it ("torch", "os.system")."""
  return not sys.stdlib_module_names.isdisjoint((module.split(".")[0], *name.split(".")[:-1]))


def attributes(value: Any) -> dict:
  """Names → values of a dict or of an object of the file; empty for anything else."""
  if isinstance(value, dict):
    return value
  return {**vars(value), **value.items} if isinstance(value, Inert) else {}


def _new(cls: type, *arguments: Any) -> Inert:
  if not isinstance(cls, _Kind):
    raise Refused(f"copyreg.__newobj__ of {cls!r}")
  return cls.__new__(cls, *arguments)


def _encode(text: str, encoding: str = "utf-8") -> bytes:
  """Bytes, as older protocols write them."""
  if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
    raise Refused("_codecs.encode")
  return text.encode("latin1")


def _number_type(dtype: Any) -> np.dtype | None:
  """The type of a pickled numpy.dtype; None for anything but numbers."""
  code = dtype.arguments[0] if isinstance(dtype, Inert) and dtype.arguments else None
  if type(dtype).__name__ != "numpy.dtype" or not isinstance(code, str) or not NUMBERS.fullmatch(code):
    return None
  order = dtype.state[1] if dtype.state and dtype.state[1] in ("<", ">") else ""
  return np.dtype(order + code)


def _scalar(dtype: Any, data: Any = b"") -> Any:
  """A number of numpy as one of Python."""
  if _number_type(dtype) is None or not isinstance(data, bytes):
    return Inert(dtype, data)
  return np.frombuffer(data, _number_type(dtype), 1)[0].item()


def _from_buffer(data: Any, dtype: Any, shape: tuple[int, ...], order: str) -> Array:
  array = Array()
  array._set(data, dtype, shape, order)
  return array


FUNCTIONS = {
  "_codecs.encode": _encode,
  "builtins.bytes": lambda *_: b"",  # older protocols write the empty one so
  "copyreg.__newobj__": _new,
  "copyreg.__newobj_ex__": lambda cls, arguments, _: _new(cls, *arguments),
  "copyreg._reconstructor": _new,
  "numpy._core.multiarray._reconstruct": lambda *_: Array(),
  "numpy._core.multiarray.scalar": _scalar,
  "numpy._core.numeric._frombuffer": _from_buffer,
}
