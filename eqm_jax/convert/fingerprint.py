"""SHA-256 of parameters: which weights they are, whatever file they came from."""

import hashlib
from typing import Any

import jax
import numpy as np


def fingerprint(params: Any, prefix: bytes = b"") -> str:
  """Of names and values (as float32) of a tree of arrays; `prefix` is hashed before them."""
  digest = hashlib.sha256(prefix)
  for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: jax.tree_util.keystr(item[0])):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf, "<f4").tobytes())
  return digest.hexdigest()
