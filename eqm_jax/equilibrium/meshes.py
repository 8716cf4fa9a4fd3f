"""Calls with arrays on meshes of either type: Auto axes, where the compiler chooses shardings, and Explicit ones.

`jax.make_mesh` makes Explicit axes: shardings are part of an array's type, and most networks do not trace with them.
The functions here run such calls with Auto axes inside, and give the results the caller's type again.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eqm_jax.equilibrium.pytrees import is_traced

KERNEL_PLATFORMS = ("tpu",)  # where networks have kernels that the compiler cannot split over devices


def call(function: Callable, arguments: tuple, *, like: jax.Array, out_specs: Any) -> Any:
  """`function(*arguments)` with arguments on the devices of one array, and its mesh axes of type Auto.

  Args:
    function: any.
    arguments: trees of arrays. Those committed to other devices than `like` are moved, see `follow`.
    like: the array that decides where to compute.
    out_specs: PartitionSpecs of the result, a prefix of its tree, for Explicit axes.
  """
  arguments = follow(like, arguments)
  mesh = jax.typeof(like).sharding.mesh
  explicit = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit)
  if not explicit:
    with known_devices(like, arguments):
      return function(*arguments)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=out_specs)(*arguments)


def known_devices(like: Any, tree: Any) -> contextlib.AbstractContextManager:
  """The context of the mesh on which the array `like` lies, if a tree's arrays lie on its devices, too.

  In it a network knows the devices that it is traced for, and how samples are split over them. That is for the kernels
  of TPUs, which the compiler cannot split. Another context stays; traced arrays have none.
  """
  leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
  if not isinstance(like, jax.Array) or is_traced(like, leaves) or not jax.sharding.get_abstract_mesh().empty:
    return contextlib.nullcontext()
  sharding = like.sharding
  devices = sharding.device_set
  elsewhere = any(leaf.committed and leaf.sharding.device_set != devices for leaf in leaves)
  if elsewhere or {device.platform for device in devices} - {*KERNEL_PLATFORMS}:
    return contextlib.nullcontext()
  if isinstance(sharding, NamedSharding):
    return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
  if len(devices) > 1:
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(Mesh([*devices], ("data",), axis_types=(AxisType.Auto,)).abstract_mesh)


def follow(like: jax.Array, tree: Any) -> Any:
  """A tree on the mesh of `like`, if that is an array on a mesh of this process; see `onto`."""
  if not isinstance(like, jax.Array) or is_traced(like):
    return tree
  if not isinstance(like.sharding, NamedSharding) or not like.is_fully_addressable:
    return tree
  return onto(like.sharding.mesh, tree)


def onto(mesh: Mesh, tree: Any) -> Any:
  """A tree on the devices of a mesh.

  Leaves on these devices stay; they keep their PartitionSpec if they lie on a mesh of the same axes. Leaves committed
  to other devices are replicated over the mesh. Traced leaves, and those not committed to a device, are left to jit.
  """
  devices = set(mesh.devices.flat)

  def moved(leaf):
    if not isinstance(leaf, jax.Array) or is_traced(leaf) or not leaf.committed:
      return leaf
    sharding, spec = leaf.sharding, PartitionSpec()
    if sharding.device_set == devices and isinstance(sharding, NamedSharding) and sharding.mesh.shape == mesh.shape:
      spec = sharding.spec
    elif sharding.device_set == devices and AxisType.Explicit not in mesh.axis_types:
      return leaf
    target = NamedSharding(mesh, spec)
    return leaf if sharding == target else jax.device_put(leaf, target)

  return jax.tree.map(moved, tree)


def with_auto_axes(mesh: Mesh) -> Mesh:
  """The same mesh with axes of type Auto."""
  return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def auto_context(mesh: Mesh) -> contextlib.AbstractContextManager:
  """The context of a mesh with Auto axes, where `jax.set_mesh` has set one with Explicit axes."""
  current = jax.sharding.get_abstract_mesh()
  if AxisType.Explicit not in current.axis_types:
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def spec_of(array: jax.Array) -> PartitionSpec:
  """The PartitionSpec of an array whose mesh has Explicit axes; of any other, an empty one."""
  return jax.typeof(array).sharding.spec


def vary_as(like: jax.Array, tree: Any) -> Any:
  """A tree that varies over the manual axes of `jax.shard_map` as an array does, so that a loop can carry both."""
  axes = _varying(like)
  if not axes:
    return tree

  def varied(leaf):
    missing = tuple(axes - _varying(leaf))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(varied, tree)


def _varying(array: jax.Array) -> frozenset[str]:
  kind = jax.typeof(array)
  return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else getattr(kind, "vma", frozenset())
