"""Conversion of published DINOv2 weights to the module and parameters of networks/dinov2.py.

The size is read off the shapes in the file: S, B, L or g, with or without register tokens, or any other.
"""

import hashlib
import logging
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from eqm_jax.checkpoints import state_dicts
from eqm_jax.networks import dinov2
from eqm_jax.networks.dinov2 import DINOv2

PUBLISHED = "dinov2_vitl14_pretrain.pth"  # of ViT-L/14, without registers: FD-DINOv2's
PUBLISHED_BYTES = 1_217_586_395
SOURCE = f'{PUBLISHED}, the "backbone only" of ViT-L/14 that the README of facebookresearch/dinov2 on GitHub links'
ANCHOR = "patch_embed.proj.weight"
UNUSED = {"mask_token"}  # of training
LEAVES = {"kernel": "weight", "scale": "weight"}  # a parameter's name → the published one, where they differ
BLOCK = re.compile(r"blocks\.(\d+)\.")

log = logging.getLogger(__name__)


def load(path: str | os.PathLike, num_heads: int | None = None) -> tuple[DINOv2, dict[str, Any]]:
  """Loads published weights.

  Args:
    path: a .pth or .safetensors file with the published names, local, read without PyTorch and without running code.
    num_heads: of the attention, which no shape in the file tells; None: width / 64, as in all published sizes.

  Returns:
    The module, and its parameters as nested dicts of float32 numpy arrays.

  Raises:
    ValueError: naming the file, if it is missing, damaged or holds no DINOv2; naming the entry, if one is missing,
      unknown, of another shape or not finite; if the heads do not divide the width.
  """
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise ValueError(f"{path}: no such file: fetch {SOURCE} ({PUBLISHED_BYTES:,} bytes), and give its path")
  tensors = _read(path)
  try:
    module = _deduced_module(tensors, num_heads)
    params = _converted(tensors, dinov2.parameter_shapes(module))
  except ValueError as error:
    raise ValueError(f"{path} ({os.path.getsize(path):,} bytes): {error}") from error
  with open(path, "rb") as file:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
  log.info("%s: DINOv2 %s, SHA-256 %s", path, module.title, sha256)
  if module.title != DINOv2().title:
    log.warning(
      "%s: DINOv2 %s, but FD-DINOv2 is published for %s: distances are not comparable with those of others",
      path, module.title, DINOv2().title,
    )  # fmt: skip
  return module, params


def _read(path: str) -> dict[str, Any]:
  """{published name: tensor} of a file."""
  contents = state_dicts.read(path)
  found = state_dicts.find(contents, ANCHOR)
  if not found:
    seen = f"a {type(contents).__name__}"
    if isinstance(contents, Mapping):
      names = [str(name) for name, value in contents.items() if state_dicts.is_tensor(value)]
      seen = str(sorted(names)[:3] or list(contents)[:3])
    raise ValueError(
      f"{path}: holds no weights with DINOv2's published names (cls_token, pos_embed, blocks.0.attn.qkv.weight, ...), "
      f"but {seen}: fetch {SOURCE}"
    )
  return state_dicts.choose(found, "model", path).tensors


def _deduced_module(tensors: Mapping[str, Any], num_heads: int | None) -> DINOv2:
  """The module that the shapes determine; `_converted` then checks all of them."""
  width = _shape(tensors, "cls_token", 3)[2]
  patch = _shape(tensors, "patch_embed.proj.weight", 4)[3]
  positions = _shape(tensors, "pos_embed", 3)[1] - 1
  grid = math.isqrt(max(positions, 0))
  if not grid or grid**2 != positions:
    raise ValueError(f"pos_embed has {positions} positions besides the class token's, but a square grid was expected")
  if num_heads is None and width % dinov2.HEAD_WIDTH:
    raise ValueError(
      f"the width {width} is no multiple of {dinov2.HEAD_WIDTH}, the published width of a head: give num_heads"
    )
  swiglu = "blocks.0.mlp.w3.weight" in tensors
  last = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
  return DINOv2(
    width=width,
    depth=len({match[1] for match in map(BLOCK.match, tensors) if match}),
    num_heads=width // dinov2.HEAD_WIDTH if num_heads is None else num_heads,
    patch_size=patch,
    grid=grid,
    mlp_width=_shape(tensors, last, 2)[1],
    registers=_shape(tensors, "register_tokens", 3)[1] if "register_tokens" in tensors else 0,
    swiglu=swiglu,
    layer_scale="blocks.0.ls1.gamma" in tensors,
  )


def _shape(tensors: Mapping[str, Any], name: str, dimensions: int) -> tuple[int, ...]:
  shape = getattr(tensors.get(name), "shape", None)
  if shape is None or len(shape) != dimensions:
    seen = f"has shape {tuple(shape)}" if shape is not None else f"is missing among {len(tensors)} names"
    raise ValueError(f"not DINOv2's weights: {name} {seen}, but an array of {dimensions} axes was expected")
  return tuple(shape)


def _converted(tensors: Mapping[str, Any], shapes: Any) -> dict[str, Any]:
  """Tensors → parameters; all names and shapes are checked before any is read."""
  flat = flax.traverse_util.flatten_dict(shapes)
  names = {path: _published_name(path) for path in flat}
  saved = tensors.keys() - UNUSED
  missing, unknown = (sorted(found) for found in (set(names.values()) - saved, saved - set(names.values())))
  if missing or unknown:
    counts = f"{len(missing)} names are missing, {len(unknown)} are unknown"
    raise ValueError(
      f"not DINOv2's weights: {counts}; missing: {missing[:3] or 'none'}; unknown: {unknown[:3] or 'none'}"
    )
  for path, name in names.items():
    seen, expected = getattr(tensors[name], "shape", None), _published_shape(path, flat[path].shape)
    if seen != expected:
      raise ValueError(f"{name} has shape {seen}, but with the other shapes in the file {expected} was expected")
  params = {path: _parameter(path, name, tensors[name]) for path, name in names.items()}
  return flax.traverse_util.unflatten_dict(params)


def _published_name(path: tuple[str, ...]) -> str:
  *modules, leaf = path
  return ".".join([*(name.replace("blocks_", "blocks.") for name in modules), LEAVES.get(leaf, leaf)])


def _published_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  """PyTorch has the outputs first: [out, in], and [out, in, height, width]."""
  if path[-1] != "kernel":
    return shape
  return shape[::-1] if len(shape) == 2 else (shape[3], shape[2], *shape[:2])


def _parameter(path: tuple[str, ...], name: str, tensor: Any) -> np.ndarray:
  array = np.asarray(state_dicts.as_array(tensor), np.float32)
  bad = ~np.isfinite(array)
  if bad.any():
    raise ValueError(f"{name}: {bad.sum():,} of {bad.size:,} values are not finite")
  if path[-1] == "kernel":
    array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
  return np.ascontiguousarray(array)
