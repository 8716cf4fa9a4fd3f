"""Reading and writing .safetensors files with numpy, in the types that numpy itself lacks, too."""

import json
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

# The library's own reader of numpy arrays has no bfloat16 and no 8-bit floats.
DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
  "F8_E8M0": ml_dtypes.float8_e8m0fnu,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
LONGEST_HEADER = 100_000_000  # bytes, as the library has it


def is_safetensors(path: str | os.PathLike) -> bool:
  """Whether a file begins as the format does: the length of its header, and the header's brace."""
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    return 2 <= length <= LONGEST_HEADER and file.read(1) == b"{"


def read(content: bytes) -> dict[str, np.ndarray]:
  """The tensors of a file's content, as they are stored.

  Raises:
    ValueError: if it is not complete, or a tensor has another type.
  """
  try:
    views = safetensors.deserialize(content)
  except safetensors.SafetensorError as error:
    raise ValueError(f"not a complete .safetensors file ({error}): fetch it again") from error
  tensors = {}
  for name, view in views:
    if view["dtype"] not in DTYPES:
      raise ValueError(f"{name} is of type {view['dtype']}, which is not supported: save it as float32")
    tensors[name] = np.frombuffer(view["data"], DTYPES[view["dtype"]]).reshape(view["shape"])
  return tensors


def metadata(content: bytes) -> dict[str, Any]:
  """The strings stored with the tensors of a complete file; those that are JSON as what they stand for."""
  length = int.from_bytes(content[:8], "little")
  return {name: _value(text) for name, text in json.loads(content[8 : 8 + length]).get("__metadata__", {}).items()}


def _value(text: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return {"True": True, "False": False, "None": None}.get(text, text)  # str(value), as Python writes it


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], args: Mapping[str, Any]):
  """Writes tensors, and `args` as one JSON object in the metadata.

  The file is written under another name and renamed, so an existing file stays until the new one is complete.
  """
  partial = f"{os.fspath(path)}.partial"
  try:
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, partial, {"format": "pt", "args": json.dumps(dict(args))})
    os.replace(partial, path)
  finally:
    if os.path.exists(partial):
      os.remove(partial)
