"""This process's devices, and the other processes of the run."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def local_mesh() -> Mesh:
  """All devices of this process along one axis, `data`."""
  return Mesh(np.asarray(jax.local_devices()), ("data",))


def replicate(tree: Any) -> Any:
  """Arrays, whole on every device of this process."""
  return jax.device_put(tree, NamedSharding(local_mesh(), PartitionSpec()))


def split(tree: Any) -> Any:
  """Arrays, split over the devices of this process along their first axis."""
  return jax.device_put(tree, NamedSharding(local_mesh(), PartitionSpec("data")))


def in_batches(function: Callable, array: np.ndarray, batch_size: int, progress: str = "") -> Any:
  """Applies `function` part by part, on all devices of this process.

  Every device gets `batch_size` rows at a time, so that what it computes of a row does not depend on how many
  devices there are; the last part is filled up, so that one shape is compiled.

  Args:
    function: an array of rows, split over the devices → a tree of arrays with as many rows.
    array: [N, ...], N at least 1.
    batch_size: rows on each device.
    progress: what a progress bar says; "": there is none.

  Returns:
    The tree, as numpy arrays [N, ...].
  """
  size, parts = batch_size * jax.local_device_count(), []
  with tqdm.tqdm(total=len(array), desc=progress, unit="row", disable=None if progress else True) as bar:
    for first in range(0, len(array), size):
      part = array[first : first + size]
      filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
      results = jax.device_get(function(split(filled)))
      parts.append(jax.tree.map(lambda leaf, count=len(part): leaf[:count], results))
      bar.update(len(part))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def process() -> tuple[int, int]:
  """Which process of the run this is, and of how many."""
  return jax.process_index(), jax.process_count()


def wait_for_all(what: str):
  """Returns when every process of the run has come here; `what` must be the same on all."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def from_first(tree: Any) -> Any:
  """A tree of float32 arrays as the first process has them."""
  if jax.process_count() == 1:
    return tree
  return jax.device_get(multihost_utils.broadcast_one_to_all(tree))


def from_all(array: np.ndarray) -> np.ndarray:
  """The array of every process, [processes, ...], bit for bit: JAX itself would round float64."""
  if jax.process_count() == 1:
    return array[None]
  words = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint32))
  return np.frombuffer(np.ascontiguousarray(words).tobytes(), array.dtype).reshape(-1, *array.shape)
