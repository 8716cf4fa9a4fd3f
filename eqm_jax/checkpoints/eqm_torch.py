"""PyTorch checkpoints of the authors' code: their state dict to this package's parameters and back.

Their network returns −f (they regress (x − ε)·c and add the output), so its last layer is negated in both directions;
no other module has their sign.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from eqm_jax.checkpoints import torch_pickle
from eqm_jax.networks import dit

# Their names → the names here. "blocks.*" stands for each block; blocks are stacked on a depth axis here.
# A linear layer is (out, in) in PyTorch and (in..., out...) here.
NAMES = {
  "x_embedder.proj": "patch_embed",
  "t_embedder.mlp.0": "time_embed/dense_0",
  "t_embedder.mlp.2": "time_embed/dense_1",
  "y_embedder.embedding_table": "label_embed",
  "blocks.*.attn.qkv": "blocks/qkv",
  "blocks.*.attn.proj": "blocks/attention_out",
  "blocks.*.mlp.fc1": "blocks/mlp_in",
  "blocks.*.mlp.fc2": "blocks/mlp_out",
  "blocks.*.adaLN_modulation.1": "blocks/modulation",
  "final_layer.linear": "final_out",
  "final_layer.adaLN_modulation.1": "final_modulation",
}
POSITIONS = "pos_embed"
NEEDED = (  # for the attributes of the model
  "x_embedder.proj.weight",
  POSITIONS,
  "y_embedder.embedding_table.weight",
  "final_layer.linear.weight",
  "blocks.0.mlp.fc1.weight",
)


def load(path: str | os.PathLike, weights: str, overrides: dict[str, Any]) -> tuple[dit.DiT, dict]:
  """Reads a .pt file of the authors' code.

  The shapes determine all attributes but `num_heads`, which comes from `overrides`, from the saved arguments, or from
  the published size of the same depth and width.

  Args:
    path: as their train script saves it (model, ema, opt, args), or a bare state dict.
    weights: "ema" or "model"; a bare state dict has one set and gives it for both.
    overrides: attributes of `DiT`.

  Returns:
    The model and its parameters, nested dicts of float32 numpy arrays.

  Raises:
    ValueError: if the file is damaged, holds another network, or lacks something that must then be passed.
  """
  contents = torch_pickle.read(path)
  if not isinstance(contents, dict):
    raise ValueError(f"{path}: holds a {type(contents).__name__}, not a state dict: give another file")
  arguments = contents.get("args") or {}
  arguments = arguments if isinstance(arguments, dict) else vars(arguments)
  state = contents if "ema" not in contents and "model" not in contents else contents.get(weights)
  if state is None:
    raise ValueError(f"{path}: has no {weights!r} weights, only {', '.join(contents)}: give another `weights`")
  if not isinstance(state, dict) or not all(isinstance(tensor, torch_pickle.Tensor) for tensor in state.values()):
    raise ValueError(f"{path}: holds no state dict of tensors under {weights!r}: give another `weights`")
  state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
  model = dit.DiT(**{**_infer(path, state, arguments, overrides), **overrides})
  return model, from_state_dict(model, state, path)


def export_reference(path: str | os.PathLike, model: dit.DiT, params: Any, *, learn_sigma: bool = False):
  """Writes parameters as a .pt file of the authors' code.

  The file has `model` and `ema`, both with these parameters, and `args`. `eqm_jax.load` of it gives the same bits.

  Args:
    path: the file to write.
    model, params: as `eqm_jax.load` or training gives them.
    learn_sigma: adds the second output half that the released scripts expect, zero as their training leaves it, to a
      model that has none.
  """
  state = to_state_dict(model, params)
  if learn_sigma and not model.learn_sigma:
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
      grouped = state[name].reshape(-1, model.channels, *state[name].shape[1:])
      doubled = np.concatenate([grouped, np.zeros_like(grouped)], axis=1)
      state[name] = doubled.reshape(-1, *state[name].shape[1:])
  arguments = {
    "model": _published_name(model),
    "num_classes": model.num_classes,
    "uncond": not model.time_input,
    "num_heads": model.num_heads,
  }
  torch_pickle.write(path, {"model": state, "ema": state}, arguments)


def from_state_dict(model: dit.DiT, state: dict[str, Any], path: str | os.PathLike = "state dict") -> dict:
  """Their tensors (anything with `shape` and `numpy()`) → nested parameters."""
  shapes = _shapes(model)
  table = dit.position_table(model.input_size // model.patch_size, model.width)
  expected = {their: _to_theirs(model, np.zeros(shapes[ours]), ours).shape for their, ours, _ in _entries(model)}
  expected[POSITIONS] = (1, *table.shape)
  missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
  if missing or extra:
    raise ValueError(
      f"{path}: not this network's state dict; missing: {missing[:3] or 'nothing'}; unknown: {extra[:3] or 'nothing'}"
    )
  for name, shape in expected.items():
    if tuple(state[name].shape) != shape:
      raise ValueError(f"{path}: {name} has shape {tuple(state[name].shape)}, but the model expects {shape}")
  if not np.allclose(state[POSITIONS].numpy()[0], table, atol=1e-5):
    raise ValueError(f"{path}: {POSITIONS} is not the fixed sin-cos table: learned positions are not supported")

  flat: dict[str, list] = {}
  for their, ours, _ in _entries(model):
    array = _to_ours(state[their].numpy().astype(np.float32), ours).reshape(shapes[ours])
    flat.setdefault(ours, []).append(array)
  stacked = {ours: np.stack(arrays) if ours.startswith("blocks/") else arrays[0] for ours, arrays in flat.items()}
  return flax.traverse_util.unflatten_dict(stacked, sep="/")


def to_state_dict(model: dit.DiT, params: Any) -> dict[str, np.ndarray]:
  """Nested parameters → their tensors, under their names and in their order."""
  flat = flax.traverse_util.flatten_dict(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params), sep="/")
  theirs = {POSITIONS: dit.position_table(model.input_size // model.patch_size, model.width)[None]}
  for their, ours, block in _entries(model):
    array = flat[ours] if block is None else flat[ours][block]
    theirs[their] = np.ascontiguousarray(_to_theirs(model, array, ours))
  return theirs


def _entries(model: dit.DiT) -> Iterator[tuple[str, str, int | None]]:
  """Their name, the path here, and the block or None, for every tensor in their order: block after block."""
  in_blocks = [pattern for pattern in NAMES if "*" in pattern]
  layers: list[tuple[str, str, int | None]] = []
  for pattern, ours in NAMES.items():
    if pattern not in in_blocks:
      layers.append((pattern, ours, None))
    elif pattern == in_blocks[0]:
      layers += [(p.replace("*", str(i)), NAMES[p], i) for i in range(model.depth) for p in in_blocks]
  for their, ours, block in layers:
    if ours == "label_embed":
      yield f"{their}.weight", f"{ours}/embedding", block
    else:
      yield f"{their}.weight", f"{ours}/kernel", block
      yield f"{their}.bias", f"{ours}/bias", block


def _shapes(model: dit.DiT) -> dict[str, tuple[int, ...]]:
  """{path: shape}, for one block where blocks are stacked."""
  flat = flax.traverse_util.flatten_dict(dit.parameter_shapes(model), sep="/")
  return {ours: leaf.shape[1:] if ours.startswith("blocks/") else leaf.shape for ours, leaf in flat.items()}


def _to_ours(array: np.ndarray, ours: str) -> np.ndarray:
  """One of their tensors, its axes reordered but not yet split."""
  if ours == "patch_embed/kernel":  # a convolution (out, C, p, p); patchify's order is (p, p, C)
    return array.transpose(2, 3, 1, 0)
  if ours.startswith("final_out/"):
    array = -array
  return array.T if ours.endswith("/kernel") else array


def _to_theirs(model: dit.DiT, array: np.ndarray, ours: str) -> np.ndarray:
  """The inverse of `_to_ours`, which also joins the axes that are split here."""
  if ours == "patch_embed/kernel":
    p = model.patch_size
    return array.reshape(p, p, model.channels, model.width).transpose(3, 2, 0, 1)
  if ours.startswith("final_out/"):
    array = -array
  if ours.endswith("/bias"):
    return array.reshape(-1)
  if ours.endswith("/embedding"):
    return array
  rows = model.width if ours == "blocks/attention_out/kernel" else array.shape[0]
  return array.reshape(rows, -1).T


def _infer(path, state: dict[str, Any], arguments: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
  """Attributes of the model, by the shapes of the tensors and the saved arguments."""
  for name in NEEDED:
    if name not in state:
      raise ValueError(
        f"{path}: has no {name}: not a checkpoint of the EqM reference (its first names: {', '.join(list(state)[:3])})"
      )
  width, channels, patch, _ = state["x_embedder.proj.weight"].shape
  depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
  num_heads = overrides.get("num_heads") or arguments.get("num_heads") or _published_heads(depth, width)
  if num_heads is None:
    raise ValueError(
      f"{path}: the number of attention heads is not in the file, and depth {depth}, width {width} is not a published "
      "size: pass num_heads=..."
    )
  return {
    "input_size": math.isqrt(state[POSITIONS].shape[1]) * patch,
    "channels": channels,
    "patch_size": patch,
    "width": width,
    "depth": depth,
    "num_heads": num_heads,
    "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
    "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    "time_input": not arguments.get("uncond", True),
    "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
  }


def _published_heads(depth: int, width: int) -> int | None:
  return next((h for d, w, h in dit.SIZES.values() if (d, w) == (depth, width)), None)


def _published_name(model: dit.DiT) -> str:
  sizes = {size: name for name, size in dit.SIZES.items()}
  size = sizes.get((model.depth, model.width, model.num_heads), "custom")
  return f"EqM-{size}/{model.patch_size}"
