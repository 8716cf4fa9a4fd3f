"""Small files of DINOv2 with the published names."""

import pathlib

import numpy as np

from eqm_jax.checkpoints import safetensors_file


def small_weights(
  width: int = 64, depth: int = 2, registers: int = 0, swiglu: bool = False, layer_scale: bool = True, grid: int = 3
) -> dict[str, np.ndarray]:
  """Random weights, {published name: array}."""
  shapes = {
    "cls_token": (1, 1, width),
    "pos_embed": (1, 1 + grid**2, width),
    "mask_token": (1, width),
    "patch_embed.proj.weight": (width, 3, 14, 14),
    "patch_embed.proj.bias": (width,),
    "norm.weight": (width,),
    "norm.bias": (width,),
  }
  if registers:
    shapes["register_tokens"] = (1, registers, width)
  mlp = {"w12": (80, width), "w3": (width, 40)} if swiglu else {"fc1": (72, width), "fc2": (width, 72)}
  dense = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), **{f"mlp.{n}": s for n, s in mlp.items()}}
  for i in range(depth):
    for name, shape in dense.items():
      shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    for n in (1, 2):
      shapes |= {f"blocks.{i}.norm{n}.weight": (width,), f"blocks.{i}.norm{n}.bias": (width,)}
      if layer_scale:
        shapes[f"blocks.{i}.ls{n}.gamma"] = (width,)
  rng = np.random.default_rng(0)
  return {name: (0.1 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def write(path: pathlib.Path, weights: dict[str, np.ndarray]) -> pathlib.Path:
  safetensors_file.write(path, weights, {})
  return path
