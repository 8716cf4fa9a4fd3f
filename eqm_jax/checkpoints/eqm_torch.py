"""Checkpoints of the authors' code: their state dict to this package's parameters and back.

Their network returns −f (they regress (x − ε)·c and add the output), so its last layer is negated in both directions;
no other module has their sign.
"""

import math
import os
import re
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np

from eqm_jax.checkpoints import safetensors_file, state_dicts, torch_pickle
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
WEIGHT_SCALE = re.compile(r"weight_scale|scale_weight")  # of a layer in 8-bit floats, as several programs save it
COARSE_TYPES = (  # coarsest first
  ml_dtypes.float8_e5m2,
  ml_dtypes.float8_e5m2fnuz,
  ml_dtypes.float8_e4m3fn,
  ml_dtypes.float8_e4m3fnuz,
  ml_dtypes.bfloat16,
  np.float16,
)
FIRST = "x_embedder.proj.weight"
NEEDED = {  # for the attributes of the model → number of axes
  FIRST: 4,
  "y_embedder.embedding_table.weight": 2,
  "final_layer.linear.weight": 2,
  "blocks.0.mlp.fc1.weight": 2,
}


def load(path: str | os.PathLike, weights: str, overrides: dict[str, Any]) -> tuple[dit.DiT, dict]:
  """Reads a file of the authors' network, saved by their script or another.

  The shapes determine all attributes but `num_heads`, which comes from the saved arguments, from `overrides`, or from
  the published size of the same depth and width.

  Args:
    path: a .pt or .safetensors file, or the index of several: their train script's (model, ema, opt, args), a bare
      state dict, or one anywhere among other objects, in any precision, and with the names that wrappers give.
    weights: "ema", "model" or the keys that lead to one set of weights, see `state_dicts.choose`.
    overrides: attributes of `DiT`.

  Returns:
    The model and its parameters, nested dicts of float32 numpy arrays.

  Raises:
    ValueError: if the file is damaged, holds another network, or lacks something that must then be passed.
  """
  contents = state_dicts.read(path)
  found = state_dicts.find(contents, FIRST)
  if not found:
    names = ", ".join(map(str, list(contents)[:3])) if isinstance(contents, dict) else f"a {type(contents).__name__}"
    raise ValueError(
      f"{path}: has no {FIRST}: not a checkpoint of the EqM reference (it begins with: {names or 'nothing'})"
    )
  chosen = state_dicts.choose(found, weights, path)
  saved = _infer(path, chosen.tensors, {**state_dicts.arguments(contents), **chosen.attributes}, overrides)
  model = dit.DiT(**saved)
  asked = dit.DiT(**{**saved, **overrides})
  if asked.input_size != model.input_size:
    raise ValueError(
      f"{path}: input_size is {model.input_size} in the file, but {asked.input_size} is asked for: leave it out, "
      "or give another file"
    )
  dit.check_fits(os.fspath(path), model, asked)
  return asked, from_state_dict(model, chosen.tensors, path)


def export_reference(path: str | os.PathLike, model: dit.DiT, params: Any, *, learn_sigma: bool = False):
  """Writes parameters for the authors' network, in their layout.

  A .pt file is as their training writes it: `model` and `ema`, both with these parameters, and `args`. A .safetensors
  file has the state dict alone, and `args` as JSON in its metadata. `args` has what their network is built with, by the
  names of its arguments. `eqm_jax.load` of either gives the same bits.

  Args:
    path: the file to write; its suffix .safetensors decides the format.
    model, params: as `eqm_jax.load` or training gives them.
    learn_sigma: adds the second output half that the released scripts expect, zero as their training leaves it, to a
      model that has none.

  Raises:
    ValueError: if their network cannot have these parameters.
  """
  if model.energy == "scalar":
    raise ValueError("model.energy = 'scalar': the authors' network has no such energy, only 'none', 'dot' and 'l2'")
  for name, value in dit.beyond_the_paper(model).items():
    raise ValueError(
      f"model.{name} = {value!r}: the authors' network has no such option. `eqm_jax.save_pretrained` writes this model"
    )
  state = to_state_dict(model, params)
  if learn_sigma and not model.learn_sigma:
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
      grouped = state[name].reshape(-1, model.channels, *state[name].shape[1:])
      doubled = np.concatenate([grouped, np.zeros_like(grouped)], axis=1)
      state[name] = doubled.reshape(-1, *state[name].shape[1:])
  arguments = {
    "model": _published_name(model),
    "input_size": model.input_size,
    "patch_size": model.patch_size,
    "in_channels": model.channels,
    "hidden_size": model.width,
    "depth": model.depth,
    "num_heads": model.num_heads,
    "mlp_ratio": model.mlp_ratio,
    "num_classes": model.num_classes,
    "learn_sigma": learn_sigma or model.learn_sigma,
    "uncond": not model.time_input,
    "ebm": model.energy,
  }
  path = os.path.expanduser(path)
  if path.endswith(".safetensors"):
    safetensors_file.write(path, state, arguments)
  else:
    torch_pickle.write(path, {"model": state, "ema": state}, arguments)


def from_state_dict(model: dit.DiT, state: dict[str, Any], path: str | os.PathLike = "state dict") -> dict:
  """Their tensors, of any kind that `state_dicts.as_array` reads → nested parameters.

  Unknown single numbers are left out, such as counters of averages, but not scales of weights.
  """
  shapes = _shapes(model)
  table = dit.position_table(model.input_size // model.patch_size, model.width)
  expected = {their: _to_theirs(model, np.zeros(shapes[ours]), ours).shape for their, ours, _ in _entries(model)}
  if POSITIONS in state:  # averages of what is trained alone lack the fixed table
    expected[POSITIONS] = (1, *table.shape)
  others = {name for name in state.keys() - expected.keys() if state_dicts.is_tensor(state[name])}
  unknown = {name for name in others if math.prod(state[name].shape) > 1 or WEIGHT_SCALE.search(name)}
  missing, extra = sorted(expected.keys() - state.keys()), sorted(unknown)
  if missing or extra:
    raise ValueError(
      f"{path}: not this network's state dict; missing: {missing[:3] or 'nothing'}; unknown: {extra[:3] or 'nothing'}"
    )
  for name, shape in expected.items():
    _check_tensor(path, name, state[name])
    if tuple(state[name].shape) != shape:
      raise ValueError(f"{path}: {name} has shape {tuple(state[name].shape)}, but the model expects {shape}")
  if POSITIONS in state and not _is_position_table(path, state[POSITIONS], table):
    raise ValueError(f"{path}: {POSITIONS} is not the fixed sin-cos table: learned positions are not supported")

  flat: dict[str, list] = {}
  for their, ours, _ in _entries(model):
    array = _to_ours(_numbers(path, their, state[their]), ours).reshape(shapes[ours])
    flat.setdefault(ours, []).append(array)
  stacked = {ours: np.stack(arrays) if ours.startswith("blocks/") else arrays[0] for ours, arrays in flat.items()}
  return flax.traverse_util.unflatten_dict(stacked, sep="/")


def _check_tensor(path: str | os.PathLike, name: str, tensor: Any):
  if not state_dicts.is_tensor(tensor):
    raise ValueError(
      f"{path}: {name} is a {type(tensor).__name__}, not a whole tensor of numbers: gather the parts of sharded ones "
      "and save it again"
    )


def _numbers(path: str | os.PathLike, name: str, tensor: Any) -> np.ndarray:
  """The values of a tensor as float32."""
  array = state_dicts.as_array(tensor)
  if array.dtype.kind in "biuc":
    raise ValueError(f"{path}: {name} is {array.dtype}, with no scale that makes it a weight: save it as floats")
  return array.astype(np.float32)


def _is_position_table(path: str | os.PathLike, tensor: Any, table: np.ndarray) -> bool:
  """Whether these are the fixed positions to their own precision: of the coarsest type that has all of them."""
  values = _numbers(path, POSITIONS, tensor)
  types = (kind for kind in COARSE_TYPES if np.array_equal(values.astype(kind).astype(np.float32), values))
  precision = ml_dtypes.finfo(next(types, np.float32))
  nearest = max(1e-5, float(precision.smallest_subnormal), getattr(tensor, "resolution", 0.0))
  return np.allclose(values[0], table, rtol=float(precision.eps), atol=nearest)


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
  for name, axes in {**NEEDED, **({POSITIONS: 3} if POSITIONS in state else {})}.items():
    if name not in state:
      raise ValueError(
        f"{path}: has no {name}: not a checkpoint of the EqM reference (its first names: {', '.join(list(state)[:3])})"
      )
    _check_tensor(path, name, state[name])
    if len(state[name].shape) != axes or 0 in state[name].shape:
      raise ValueError(
        f"{path}: {name} has shape {tuple(state[name].shape)}, but the reference's has {axes} axes: another network, "
        "or a part of a sharded one"
      )
  width, channels, patch, _ = state[FIRST].shape
  depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
  num_heads = arguments.get("num_heads")
  if type(num_heads) is not int or num_heads < 1 or width % num_heads:  # of something else
    num_heads = overrides.get("num_heads") or _published_heads(depth, width)
  if num_heads is None:
    raise ValueError(
      f"{path}: the number of attention heads is not in the file, and depth {depth}, width {width} is not a published "
      "size: pass num_heads=..."
    )
  if width % num_heads:
    raise ValueError(f"{path}: width is {width} in the file, which num_heads = {num_heads} does not divide")
  recorded = overrides.get("input_size", arguments.get("input_size"))
  input_size = math.isqrt(state[POSITIONS].shape[1]) * patch if POSITIONS in state else recorded
  if input_size is None:
    raise ValueError(f"{path}: has no {POSITIONS}, whose shape gives the size of the images: pass input_size=...")
  ebm = arguments.get("ebm", "none")
  return {
    "input_size": input_size,
    "channels": channels,
    "patch_size": patch,
    "width": width,
    "depth": depth,
    "num_heads": num_heads,
    "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
    "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    "time_input": overrides.get("time_input", not arguments.get("uncond", True)),
    "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
    "energy": {"dot": "dot", "mean": "dot", "l2": "l2"}.get(ebm if isinstance(ebm, str) else None, "none"),
  }


def _published_heads(depth: int, width: int) -> int | None:
  return next((h for d, w, h in dit.SIZES.values() if (d, w) == (depth, width)), None)


def _published_name(model: dit.DiT) -> str:
  sizes = {size: name for name, size in dit.SIZES.items()}
  size = sizes.get((model.depth, model.width, model.num_heads), "custom")
  return f"EqM-{size}/{model.patch_size}"
