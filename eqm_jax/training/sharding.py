"""Where arrays live: one mesh, and a short ordered table from parameter paths to axes.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor`
splits the parameters within a layer. `dcn_data` splits the batch over slices of TPUs or nodes of GPUs, whose
network is slow: all that crosses it is the sum of the gradients and, with the dispersive loss, the activations of the
last block. The network constrains its activations in the same way (networks.dit).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eqm_jax.checks import one_of
from eqm_jax.networks.dit import SAMPLES, SLICES, WITHIN_LAYER
from eqm_jax.trees import path_name

BATCH = SAMPLES
AXES = (*SAMPLES, WITHIN_LAYER)
EMA = ("parameters", "devices")
GATHER = ("layer", "step")
AUTO_FSDP = 16  # devices; docs/plan.md compares the sizes
Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh(
  data: int, fsdp: int | None, tensor: int, *, dcn_data: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over all devices; one of the sizes but `dcn_data` may be −1, for the rest.

  With `fsdp` None it is AUTO_FSDP, or the largest part of it that divides the devices that the others leave.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices, or `dcn_data` is not the number of their slices.
  """
  devices = jax.devices() if devices is None else devices
  if fsdp is None:
    fsdp = math.gcd(AUTO_FSDP, len(devices) // math.prod(max(1, size) for size in (dcn_data, data, tensor)))
  sizes = [dcn_data, data, fsdp, tensor]
  described = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes) if axis != SLICES or size != 1)
  if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1 or dcn_data == -1:
    remedy = f"sizes must be positive, and at most one -1 for the rest, which {SLICES} cannot be"
    raise ValueError(f"mesh {described}: {remedy}")
  if -1 in sizes:
    sizes[sizes.index(-1)] = max(1, len(devices) // math.prod(size for size in sizes if size > 0))
  if math.prod(sizes) != len(devices):
    multiple = " or a multiple of them" if -1 in (data, fsdp, tensor) else ""
    raise ValueError(
      f"mesh {described} needs {math.prod(sizes)} devices{multiple}, but there are {len(devices)}: set config.mesh"
    )
  # Auto axes: jax.make_mesh would default to Explicit ones, which linen does not support.
  kinds = (AxisType.Auto,) * len(AXES)
  slices = {getattr(device, "slice_index", None) for device in devices}
  if dcn_data == 1 and len(slices) == 1:
    return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)
  if None in slices or devices[0].platform == "cpu":  # consecutive devices of consecutive processes play a slice
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered).reshape(sizes), AXES, axis_types=kinds)
  return Mesh(_over_slices(described, sizes, devices, len(slices)), AXES, axis_types=kinds)


def _over_slices(described: str, sizes: Sequence[int], devices: Sequence[jax.Device], slices: int) -> np.ndarray:
  """Devices in the order of a mesh whose first axis goes over their slices."""
  if sizes[0] == 1 and devices[0].platform == "gpu":  # NCCL sees by itself which of them are neighbours
    return mesh_utils.create_device_mesh(sizes, devices)
  if slices != sizes[0]:
    raise ValueError(
      f"mesh {described}: the number of slices of TPUs, or nodes of GPUs, of the {len(devices)} devices is {slices}: "
      f"set config.mesh.{SLICES} to {slices}"
    )
  try:
    inner, outer = (1, *sizes[1:]), (sizes[0], 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
  except (ValueError, AssertionError, NotImplementedError) as error:
    raise ValueError(f"mesh {described}: it does not fit the slices of the devices ({error})") from error


def batch_sharding(mesh: Mesh, batch_size: int, grad_accum_steps: int = 1) -> NamedSharding:
  """The leading axis over `dcn_data`, `data` and `fsdp`.

  Args:
    mesh: from `make_mesh`.
    batch_size: samples in one step.
    grad_accum_steps: microbatches that a step computes one after another.

  Raises:
    ValueError: if the batch does not divide.
  """
  num_shards = math.prod(mesh.shape[axis] for axis in BATCH)
  multiple = num_shards * grad_accum_steps
  if batch_size % multiple:
    axes = " × ".join(BATCH if mesh.shape[SLICES] > 1 else BATCH[1:])
    microbatches = f" in {grad_accum_steps} microbatches (train.grad_accum_steps)" if grad_accum_steps > 1 else ""
    raise ValueError(
      f"batch size {batch_size} does not divide over {num_shards} devices ({axes}){microbatches}: "
      f"use a multiple of {multiple}"
    )
  return NamedSharding(mesh, PartitionSpec(BATCH))


def local_rows(placed: NamedSharding, batch_size: int) -> np.ndarray:
  """The rows of the global batch that this process's devices hold, ascending.

  They may have gaps, and several processes may hold the same rows: the order of devices in a mesh depends on the
  machine, and along `tensor` all devices hold the same rows.
  """
  held = placed.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def global_array(placed: NamedSharding, batch_size: int, rows: np.ndarray, array: np.ndarray) -> jax.Array:
  """The global array [batch_size, ...], from the `rows` that this process's devices hold."""

  def shard(index):
    first, last, _ = index[0].indices(batch_size)
    begin = np.searchsorted(rows, first)
    return array[begin : begin + last - first]

  return jax.make_array_from_callback((batch_size, *array.shape[1:]), placed, shard)


def samples_on_device(mesh: Mesh, batch_size: int) -> int:
  """Samples of a batch on one device; the devices along `tensor` share them."""
  return batch_size // math.prod(mesh.shape[axis] for axis in BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def tree_shardings(shapes: Any, rules: Rules, mesh: Mesh) -> Any:
  """The sharding of every leaf of a tree of shapes.

  The first rule whose regular expression is found in the leaf's path decides;
  without one, `fsdp` takes the largest axis that it divides. The optimizer's and the
  EMA's paths end as the parameters' do, so they follow them.

  Args:
    shapes: a tree of arrays or ShapeDtypeStructs.
    rules: ordered (regex, axis name or None for each array axis; an empty tuple replicates the array).
    mesh: from `make_mesh`.

  Raises:
    ValueError: if a rule names an axis that the mesh lacks, has another rank than
      the parameter, or an axis does not divide.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, _spec(path, leaf.shape, rules, mesh)), shapes
  )


def state_shardings(shapes: Any, options: ml_collections.ConfigDict, mesh: Mesh) -> Any:
  """The sharding of every leaf of a TrainState; `options` is the config's section `sharding`.

  Raises:
    ValueError: as `tree_shardings`, and if `ema` is not one of `EMA`.
  """
  one_of("sharding.ema", options.ema, EMA)
  one_of("sharding.gather", options.gather, GATHER)
  shardings = tree_shardings(shapes, options.rules, mesh)
  if options.ema == "parameters":
    return shardings
  # Only its own update reads the average, so no device needs another's shard.
  return shardings.replace(
    ema_params=jax.tree.map(
      lambda leaf, placed: NamedSharding(mesh, _also_over_data(leaf.shape, placed.spec, mesh)),
      shapes.ema_params,
      shardings.ema_params,
    )
  )


def gathered_blocks(params: Any, shardings: Any, dtype: str) -> Any:
  """The blocks' parameters in the type of the products and whole along `fsdp`, without the modulation.

  Each device then holds all blocks' weights in that type. The modulation stays split: the network computes it outside
  of the loop over the blocks, from each device's part. The scales of queries and keys, two vectors, keep their type.
  """

  def whole(leaf, placed):
    shape, spec = _merged(leaf.shape, placed)
    merged = jax.lax.with_sharding_constraint(leaf.astype(dtype).reshape(shape), NamedSharding(placed.mesh, spec))
    spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
    return jax.lax.with_sharding_constraint(merged, NamedSharding(placed.mesh, spec)).reshape(leaf.shape)

  return jax.tree.map(whole, *(_looped(tree) for tree in (params, shardings)))


def with_gathered(params: Any, gathered: Any, shardings: Any) -> Any:
  """Parameters whose blocks are those of `gathered_blocks`, but whose gradients are split and typed as `params` are.

  So the gradients of each block leave the loop over the blocks split.
  """
  looped, split = _looped(params), _looped(shardings)

  @jax.custom_vjp
  def replace(looped, gathered):
    return gathered

  def pull_back(_, gradients):
    gradients = jax.lax.with_sharding_constraint(gradients, split)
    return jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), gradients, looped), None

  replace.defvjp(lambda looped, gathered: (gathered, None), pull_back)
  return {**params, "blocks": {**params["blocks"], **replace(looped, gathered)}}


def _looped(params: Any) -> Any:
  """Of a tree of parameters those that are gathered: the blocks' matrices and their biases."""
  return {name: layer for name, layer in params["blocks"].items() if name not in ("modulation", "qk_norm")}


def table(shapes: Any, shardings: Any) -> str:
  """One line for each array: its path, its mesh axes, and its size on one device."""
  rows = []
  for (path, leaf), placed in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings)):
    size = held(leaf, placed)
    axes = ", ".join(str(axis) for axis in placed.spec) if any(placed.spec) else "replicated"
    rows.append(f"  {path_name(path):32s} {size / 2**20:9.3f} MiB  {axes}")
  return "\n".join(rows)


def held(shapes: Any, shardings: Any) -> int:
  """Bytes of a tree on one device, without the padding of tiles."""
  leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings))
  return sum(math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, placed in leaves)


def _spec(path: tuple, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> PartitionSpec:
  name = path_name(path)
  for pattern, axes in rules:
    if re.search(pattern, name) and shape:
      _check_rule(pattern, axes, name, shape, mesh)
      return PartitionSpec(*axes)
  fsdp = mesh.shape["fsdp"]
  dividing = [i for i, size in enumerate(shape) if size % fsdp == 0]
  if fsdp == 1 or not dividing:
    return PartitionSpec()
  largest = max(dividing, key=lambda i: shape[i])
  return PartitionSpec(*("fsdp" if i == largest else None for i in range(len(shape))))


def _merged(shape: tuple[int, ...], placed: NamedSharding) -> tuple[tuple[int, ...], PartitionSpec]:
  """The shape of stacked parameters with neighbouring axes merged that are not split, and its specification.

  The leading axis, of the layers, stays. A TPU stores matrices without the padding that narrow trailing axes take.
  """
  axes = [*placed.spec, *(None,) * (len(shape) - len(placed.spec))]
  axes = [axis if axis and placed.mesh.shape[axis] > 1 else None for axis in axes]
  sizes, kept = list(shape[:1]), axes[:1]
  for i in range(1, len(shape)):
    if i > 1 and axes[i] is None and kept[-1] is None:
      sizes[-1] *= shape[i]
    else:
      sizes.append(shape[i])
      kept.append(axes[i])
  return tuple(sizes), PartitionSpec(*kept)


def _also_over_data(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
  """`spec` with `dcn_data` and `data`, or else `data` alone, added to the longest axis that they divide further."""
  axes = [*spec, *(None,) * (len(shape) - len(spec))]
  shards = NamedSharding(mesh, spec).shard_shape(shape)
  for added in ((SLICES, "data"), ("data",)):
    dividing = [i for i, size in enumerate(shards) if size % math.prod(mesh.shape[axis] for axis in added) == 0]
    if dividing:
      longest = max(dividing, key=lambda i: shards[i])
      axes[longest] = added if axes[longest] is None else (axes[longest], *added)
      return PartitionSpec(*axes)
  return spec


def _check_rule(pattern: str, axes: Sequence[str | None], name: str, shape: tuple[int, ...], mesh: Mesh):
  rule = f"sharding rule {pattern!r} → {tuple(axes)}"
  if axes and len(axes) != len(shape):
    raise ValueError(f"{rule} has {len(axes)} axes, but {name} has shape {shape}")
  for axis, size in zip(axes, shape):
    if axis is not None and axis not in AXES[1:]:
      raise ValueError(f"{rule} names the axis {axis!r}: parameters can be split over {', '.join(AXES[1:])}")
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(f"{rule}: {axis}={mesh.shape[axis]} does not divide an axis of {name}, shape {shape}")
