"""Names of the leaves of a tree of arrays, and a fingerprint of their values."""

import hashlib
from typing import Any

import jax
import numpy as np


def path_name(path: tuple) -> str:
  """A tree path as "params/blocks/qkv/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def fingerprint(params: Any, prefix: bytes = b"") -> str:
  """SHA-256 of the names and values (as float32) of a tree, equal for the same weights in any file.

  `prefix` is hashed before them.
  """
  digest = hashlib.sha256(prefix)
  for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: jax.tree_util.keystr(item[0])):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf, "<f4").tobytes())
  return digest.hexdigest()
