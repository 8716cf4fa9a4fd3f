"""Conversion of the published weights of Stable Diffusion's autoencoder to a module and its parameters.

Three layouts are read: the directory that diffusers writes (config.json and one .safetensors), with the attention's old
or new names; its .safetensors alone; and the original code's (CompVis), alone or within Stable Diffusion's checkpoint.
"""

import dataclasses
import json
import re
from typing import Any

import jax
import numpy as np
from etils import epath

from eqm_jax.checkpoints import safetensors_file
from eqm_jax.networks.autoencoder import Autoencoder, parameter_shapes
from eqm_jax.trees import fingerprint as fingerprint_of

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
FIXED = {  # entries of a published config that the module has no attribute for, with their only supported values
  "act_fn": "silu",
  "shift_factor": None,
  "latents_mean": None,
  "latents_std": None,
}
# Names of the original code and old ones of diffusers → diffusers' current names.
RENAMED = (
  (r"^first_stage_model\.", ""),
  (r"\.mid\.block_([12])\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
  (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
  (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
  (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
  (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
  (r"\.nin_shortcut\.", ".conv_shortcut."),
  (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
  (r"(\.attentions\.0)\.norm\.", r"\1.group_norm."),
  (r"(\.attentions\.0)\.(?:q|query)\.", r"\1.to_q."),
  (r"(\.attentions\.0)\.(?:k|key)\.", r"\1.to_k."),
  (r"(\.attentions\.0)\.(?:v|value)\.", r"\1.to_v."),
  (r"(\.attentions\.0)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
)


def load(path: str, **overrides: Any) -> tuple[Autoencoder, dict[str, Any]]:
  """Loads published weights.

  Args:
    path: a directory with config.json and .safetensors, or one .safetensors file; local or gs://.
    **overrides: attributes of `Autoencoder`, such as `dtype`, or those that a single file lacks: `norm_num_groups` and
      `scaling_factor` (by default those of Stable Diffusion).

  Returns:
    The module, and its parameters as a nested dict of float32 arrays.

  Raises:
    ValueError: naming the file, if it is missing, damaged, or not such an autoencoder.
  """
  location = epath.Path(path).expanduser()
  if location.is_dir():
    file = next((location / name for name in WEIGHTS if (location / name).exists()), None)
    if file is None or not (location / CONFIG).exists():
      raise ValueError(f"{path}: an autoencoder's directory holds {CONFIG} and {WEIGHTS[0]}")
    attributes = _published_attributes(location / CONFIG)
    tensors = _read(file)
  elif location.exists():
    file = location
    tensors = _read(file)
    attributes = _deduced_attributes(file, tensors, overrides)
  else:
    raise ValueError(
      f"{path}: no such autoencoder: give a directory with {CONFIG} and .safetensors, or one .safetensors"
    )
  module = Autoencoder(**{**attributes, **overrides})
  return module, _to_tree(tensors, parameter_shapes(module), file)


def fingerprint(module: Autoencoder, params: Any) -> str:
  """SHA-256 of parameters and scaling, equal for equal latents, whatever file the weights are from."""
  return fingerprint_of(params, np.asarray(module.scaling_factor, "<f4").tobytes())


def _published_attributes(path: epath.Path) -> dict[str, Any]:
  """The attributes in a config.json of diffusers."""
  try:
    config = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path}: not readable as JSON ({error})") from error
  for name, expected in FIXED.items():
    if name in config and config[name] != expected:
      raise ValueError(f"{path}: {name} = {config[name]!r}, but only {expected!r} is supported")
  if any(kind not in ("DownEncoderBlock2D", "UpDecoderBlock2D") for kind in _blocks(config)):
    raise ValueError(
      f"{path}: blocks {_blocks(config)}, but only DownEncoderBlock2D and UpDecoderBlock2D are supported"
    )
  names = [field.name for field in dataclasses.fields(Autoencoder)]
  attributes = {name: value for name, value in config.items() if name in names}
  missing = {"block_out_channels", "norm_num_groups"} - set(attributes)
  if missing:
    raise ValueError(f"{path}: not the config of an AutoencoderKL: it lacks {', '.join(sorted(missing))}")
  return {**attributes, "block_out_channels": tuple(attributes["block_out_channels"])}


def _blocks(config: dict[str, Any]) -> list[str]:
  return [*config.get("down_block_types", ()), *config.get("up_block_types", ())]


def _deduced_attributes(file: epath.Path, tensors: dict[str, np.ndarray], overrides: dict[str, Any]) -> dict[str, Any]:
  """The attributes that the shapes of the tensors determine."""
  try:
    levels = 1 + max(int(re.match(r"encoder\.down_blocks\.(\d+)\.", name)[1]) for name in tensors if ".down_b" in name)
    channels = tuple(len(tensors[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"]) for level in range(levels))
    layers = sum(bool(re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", name)) for name in tensors)
    attributes = {
      "in_channels": tensors["encoder.conv_in.weight"].shape[1],
      "out_channels": len(tensors["decoder.conv_out.weight"]),
      "latent_channels": len(tensors["encoder.conv_out.weight"]) // 2,
      "block_out_channels": channels,
      "layers_per_block": layers,
      "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
      "use_quant_conv": "quant_conv.weight" in tensors,
      "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file}: holds no AutoencoderKL ({error}): give another file") from error
  if "norm_num_groups" not in overrides and any(count % Autoencoder.norm_num_groups for count in channels):
    raise ValueError(
      f"{file}: channels {channels} do not divide into 32 groups: give norm_num_groups, or the config.json"
    )
  return attributes


def _read(file: epath.Path) -> dict[str, np.ndarray]:
  """The autoencoder's tensors, by diffusers' current names."""
  try:
    tensors = safetensors_file.read(file.read_bytes())
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  renamed = {_renamed(name): tensor for name, tensor in tensors.items()}
  if any(".up.0." in name for name in tensors):  # the original code numbers the levels from the finest
    levels = 1 + max(int(re.match(r"decoder\.up_blocks\.(\d+)\.", name)[1]) for name in renamed if ".up_b" in name)
    renamed = {
      re.sub(r"(?<=up_blocks\.)\d+", lambda match: str(levels - 1 - int(match[0])), name): tensor
      for name, tensor in renamed.items()
    }
  parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
  return {name: tensor for name, tensor in renamed.items() if name.startswith(parts)}


def _renamed(name: str) -> str:
  for pattern, new in RENAMED:
    name = re.sub(pattern, new, name)
  return name


def _to_tree(tensors: dict[str, np.ndarray], shapes: Any, file: epath.Path) -> dict[str, Any]:
  """Tensors → the nested dict of the module, in its order of axes."""
  used = set()

  def convert(path, expected):
    *modules, leaf = (part.key for part in path)
    prefix = ".".join(re.sub(r"_(\d+)$", r".\1", name) for name in modules)
    name = f"{prefix}.{'bias' if leaf == 'bias' else 'weight'}"
    if name not in tensors:
      raise ValueError(f"{file}: has no {name}, only {len(tensors)} others: give the complete autoencoder")
    used.add(name)
    tensor = np.array(tensors[name], np.float32)
    if leaf == "kernel" and len(expected.shape) == 2:
      tensor = tensor.reshape(tensor.shape[:2]).T  # the original code has 1×1 convolutions
    elif leaf == "kernel":
      tensor = tensor.transpose(2, 3, 1, 0)
    if tensor.shape != expected.shape:
      raise ValueError(f"{file}: {name} has shape {tensor.shape}, but the config needs {expected.shape}")
    return np.ascontiguousarray(tensor)

  tree = jax.tree_util.tree_map_with_path(convert, shapes)
  unused = sorted(set(tensors) - used)
  if unused:
    raise ValueError(f"{file}: {unused[0]} and {len(unused) - 1} more are not in the autoencoder: check its config")
  return tree
