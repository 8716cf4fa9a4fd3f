"""One number for each array of a state, by which damage on disk is noticed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from eqm_jax.training.sharding import path_name

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes


def checksums(tree: Any) -> dict[str, int]:
  """{path: checksum} of a tree of arrays, the same numbers wherever and on how many devices they lie.

  Computed on the devices: the sum modulo 2³² of a hash of every word and its place (the finalizer of MurmurHash3). One
  changed word always changes it, several go unnoticed once in four billion times.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  found = _sums([leaf for _, leaf in leaves])
  return {path_name(path): int(value) for (path, _), value in zip(leaves, jax.device_get(found))}


def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  sharding = leaves[0].sharding
  if isinstance(sharding, NamedSharding):  # of several processes all are to know the numbers
    return jax.jit(_all, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(leaves)
  return jax.jit(_all)(leaves)


def _all(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_checksum(leaf) for leaf in leaves]


def _checksum(leaf: jax.Array) -> jax.Array:
  bits = leaf if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, UNSIGNED[leaf.dtype.itemsize])
  words = bits.astype(jnp.uint32)
  # The place of every word, from the places along its axes: one long axis could not be split over devices as it is.
  strides = [functools.reduce(lambda a, b: a * b, leaf.shape[axis + 1 :], 1) for axis in range(leaf.ndim)]
  places = [jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(s) for axis, s in enumerate(strides)]
  h = words ^ (sum(places, jnp.ones(leaf.shape, jnp.uint32)) * jnp.uint32(0x9E3779B9))
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    h = (h ^ (h >> shift)) * jnp.uint32(factor)
  return jnp.sum(h, dtype=jnp.uint32)
