"""What a benchmark ran on, and whether a model fits it: devices, processor, versions; bytes needed and available."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from eqm_jax import hardware
from eqm_jax.benchmark import measure
from eqm_jax.networks.dit import DiT
from eqm_jax.training import sharding

# What must be the same for two benchmarks to be comparable.
SAME_MACHINE = ("platform", "device", "devices", "processor", "instruction_sets", "cores")
REMEDY = (
  "make train.batch_size smaller, set model.remat to 'dots_no_batch' or 'full', split the batch with train.accumulate, "
  "or give the mesh more devices"
)


def describe(devices: Sequence[jax.Device]) -> dict[str, Any]:
  """The machine, as the results name it."""
  processor = hardware.processor()
  return {
    "platform": devices[0].platform,
    "device": devices[0].device_kind,
    "devices": len(devices),
    "processor": processor.name,
    "instruction_sets": list(processor.instruction_sets),
    "cores": hardware.cores(),
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "compilation_cache": jax.config.jax_compilation_cache_dir,  # with one, compile times are those of reading it
  }


def sentence(machine: dict[str, Any]) -> str:
  """The machine in one line."""
  sets = ", ".join(machine["instruction_sets"]) or "vector instructions unknown"
  versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
  processor = f"{machine['processor']} ({sets}), {machine['cores']} cores"
  devices = "" if machine["platform"] == "cpu" else f"{machine['devices']} × {machine['device']}; "
  forced = f", {machine['devices']} forced devices" if not devices and machine["devices"] > 1 else ""
  flags = f"; XLA_FLAGS={machine['xla_flags'].strip()}" if machine["xla_flags"].strip() else ""
  return f"{devices}{processor}{forced}; {versions}{flags}"


def check_memory(
  config: ml_collections.ConfigDict, shapes: Any, shardings: Any, devices: Sequence[jax.Device]
) -> dict[str, int | None]:
  """Refuses, before anything is compiled, a training step that cannot fit.

  Args:
    config: the whole config.
    shapes, shardings: of the training state.
    devices: of the mesh.

  Returns:
    estimate and available, in bytes of one device.

  Raises:
    ValueError: naming both, and what helps.
  """
  model = DiT(**config.model)
  state = sharding.held(shapes, shardings)
  gradient = sharding.held(shapes.params, shardings.params)
  mesh = jax.tree.leaves(shardings)[0].mesh
  samples = config.train.batch_size / (mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulate)
  activations = round(samples * activation_bytes(model) / mesh.shape["tensor"])
  refuse("the training step", state + gradient + activations, measure.available_memory(devices))
  return {"estimate": state + gradient + activations, "available": measure.available_memory(devices)}


def refuse(what: str, needed: int | None, available: int | None):
  """Raises ValueError if more bytes are needed on a device than it can take."""
  if not fits(needed, available):
    sizes = f"{needed / 2**30:.2f} GiB on each device, but {available / 2**30:.2f} GiB are available"
    raise ValueError(f"{what} needs about {sizes}: {REMEDY}")


def fits(needed: int | None, available: int | None) -> bool:
  """Whether a device can take so many bytes; yes where one of the numbers is missing."""
  return needed is None or available is None or needed <= available


def activation_bytes(model: DiT) -> int:
  """About what the backward pass keeps of one sample: a lower estimate, by formula.

  Of each block: without rematerialisation its matrix products' factors and results, and the attention weights before
  and after the softmax; of the policies "dots" and "dots_no_batch" what they name; of "full" the block's input alone.
  """
  T, D, heads = (model.input_size // model.patch_size) ** 2, model.width, model.num_heads
  F, size = round(D * model.mlp_ratio), jnp.dtype(model.dtype).itemsize
  products = size * T * (5 * D + F)  # query, key, value, two results; the hidden layer
  weights = heads * T * T * size
  block = {
    "none": 2 * products + 2 * weights,
    "dots": products + weights,
    "dots_no_batch": products,
    "full": size * T * D,
  }[model.remat]
  second_order = 1 if model.energy == "none" else 2
  return second_order * model.depth * block
