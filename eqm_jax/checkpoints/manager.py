"""Every call of Orbax: the checkpoints of a run, and plain directories of parameters; checksums of both.

A checkpoint holds `state` (step, params, ema_params, opt_state), `data` (the position of the input iterator, the same
on every process), so that a resumed run ends with the bits of an uninterrupted one, and `checksums` of the arrays.
Orbax writes a checkpoint under another name and renames it, so a killed save leaves the previous ones complete; where
the newest is damaged on disk, the one before it is used.
"""

import contextlib
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from eqm_jax import checks, distributed
from eqm_jax.trees import path_name

DIRECTORY = "checkpoints"
DAMAGED = "checkpoints_damaged"  # checkpoints that a resumed run could not read, kept for inspection
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes

log = logging.getLogger(__name__)


class DamagedCheckpoint(ValueError):
  """A checkpoint whose content differs from what was saved."""


# ---------------------------------------------------------------- a run's checkpoints


def open_manager(
  workdir: str, keep: int | None = None, best: Callable[[], int | None] = lambda: None
) -> ocp.CheckpointManager:
  """The checkpoints of a run, written asynchronously: the newest `keep` and that of the step `best()` are kept.

  Without `keep` nothing is made or removed, for readers.
  """
  if keep is None:
    options = ocp.CheckpointManagerOptions(create=False)
  else:
    checks.at_least("checkpoint.keep", keep, 1)
    policy = preservation.AnyPreservationPolicy([preservation.LatestN(keep), _Best(best)])
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
  json = ocp.JsonCheckpointHandler
  handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": json(), "checksums": json()}
  directory = os.path.abspath(os.path.join(workdir, DIRECTORY))
  return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


class _Best(preservation.PreservationPolicy):
  """Keeps the checkpoint of one step, which may change."""

  def __init__(self, best: Callable[[], int | None]):
    self._best = best

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    best = self._best()
    return [info.step == best for info in checkpoints]


def save(manager: ocp.CheckpointManager, step: int, state: Any, iterator: grain.DatasetIterator):
  """Starts saving; returns once the device's arrays are copied and may be donated.

  Raises:
    OSError: if this or the save before it could not be written.
  """
  args = ocp.args.Composite(
    state=ocp.args.PyTreeSave(state),
    data=ocp.args.JsonSave(iterator.get_state()),
    checksums=ocp.args.JsonSave(checksums(state)),
  )
  with _write_errors(manager):
    manager.save(step, args=args, force=True)  # the caller decides when to save


@contextlib.contextmanager
def finishing(manager: ocp.CheckpointManager) -> Iterator[None]:
  """After the block, waits until the last save is on disk, and closes the manager.

  Raises:
    OSError: if it could not be written.
  """
  try:
    yield
    with _write_errors(manager):
      manager.wait_until_finished()
  finally:
    with contextlib.suppress(Exception):  # a save's error is raised above, or hides the one that is on its way
      manager.close()


def preempted(manager: ocp.CheckpointManager, step: int) -> bool:
  """Whether all processes are to stop after this step, because one received SIGTERM."""
  return manager.reached_preemption(step)


def steps(workdir: str) -> list[int]:
  """The steps of a run's finished checkpoints, ascending. Waits for no other process."""
  return sorted(ocp.path.step.checkpoint_steps(os.path.join(workdir, DIRECTORY)))


def restore_newest(
  manager: ocp.CheckpointManager, shapes: Any, iterator: grain.DatasetIterator
) -> tuple[Any, int] | None:
  """The newest intact state, placed by the shardings of `shapes` (ShapeDtypeStructs), and its step.

  Sets the iterator to its saved position. Newer checkpoints that are damaged are logged as warnings and moved aside,
  since their steps will be saved again.

  Returns:
    None: there is no checkpoint.

  Raises:
    ValueError: if none can be read, or one holds other arrays than `shapes`.
  """
  damaged = []
  for step in sorted(manager.all_steps(), reverse=True):
    state, data, damage = _read_together(f"{manager.directory}/{step}", shapes)
    if damage is None:
      _set_aside(manager, damaged)
      iterator.set_state(data)
      return state, step
    log.warning("%s", damage)
    damaged.append(step)
  if damaged:
    raise ValueError(
      f"{manager.directory}: no checkpoint can be read, of steps {damaged}; the warnings above have the reasons. "
      "Nothing was changed: check the disk, or choose another --workdir"
    )
  return None


def restore_params(workdir: str, name: str, shapes: Any, step: int | None = None) -> tuple[Any, int]:
  """One parameter tree, `params` or `ema_params`, of a run's checkpoint, on the default device; and the step.

  Args:
    workdir: of the run.
    name: of the tree.
    shapes: of the tree.
    step: of the checkpoint; None: the newest.

  Raises:
    ValueError: if the run has no such checkpoint, or one of a model of other shapes.
  """
  saved_steps = steps(workdir)
  if not saved_steps or step not in (None, *saved_steps):
    requested = "" if step is None else f" of step {step}"
    raise ValueError(
      f"{workdir}: no finished checkpoint{requested} in its {DIRECTORY}, there are {saved_steps or 'none'}; "
      "was it trained?"
    )
  placed = _on_first_device({name: shapes})
  candidates = saved_steps[::-1] if step is None else [step]
  for candidate in candidates:
    directory = os.path.join(os.path.abspath(workdir), DIRECTORY, str(candidate))
    try:
      state, _, saved = _read(directory, placed)
      _check_bits(directory, state, saved)
      return _uncommitted(state[name]), candidate
    except DamagedCheckpoint as error:
      if candidate == candidates[-1]:
        raise
      log.warning("%s. The one before it is used", error)


# ---------------------------------------------------------------- directories of parameters


def write_tree(directory: str, tree: Any):
  """Writes a tree of arrays that Orbax alone can read back."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(os.path.abspath(directory), tree)


def read_tree(directory: str, shapes: Any) -> Any:
  """Reads a tree of arrays onto the default device.

  Raises:
    ValueError: if it is not there, is damaged, or has other shapes.
  """
  directory = os.path.abspath(directory)
  with ocp.PyTreeCheckpointer() as checkpointer:
    with _read_errors(directory):
      metadata = checkpointer.metadata(directory).item_metadata
    _check_shapes(directory, metadata, shapes)
    with _read_errors(directory):
      return _uncommitted(checkpointer.restore(directory, args=_partial_restore(_on_first_device(shapes))))


# ---------------------------------------------------------------- reading one checkpoint


def _read(directory: str, shapes: Any) -> tuple[Any, Any, dict[str, int]]:
  """The arrays of `shapes`, the iterator's position, and checksums of a checkpoint; waits for no other process.

  Raises:
    DamagedCheckpoint: if it cannot be read.
    ValueError: if it holds other arrays.
  """
  path, handler, json = epath.Path(directory), ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
  with _read_errors(directory):
    metadata = handler.metadata(path / "state")
  _check_shapes(directory, metadata, shapes)
  with _read_errors(directory):
    state = handler.restore(path / "state", args=_partial_restore(shapes))
    data = json.restore(path / "data")
    has_checksums = (path / "checksums").exists()
    saved = json.restore(path / "checksums") if has_checksums else {}
  if not has_checksums:
    log.warning("%s: has no checksums, its arrays are used unchecked", directory)
  return state, data, saved


def _read_together(directory: str, shapes: Any) -> tuple[Any, Any, str | None]:
  """(state, position, None), or (None, None, damage); all processes agree which of the two."""
  state = data = damage = None
  saved = {}
  try:
    state, data, saved = _read(directory, shapes)
  except DamagedCheckpoint as error:
    damage = str(error)
  # Each process has read its own part of the arrays: damage in one of them counts for all.
  if not distributed.from_all(np.asarray([damage is None], np.uint32)).all():
    return None, None, damage or f"{directory}: damaged checkpoint, as another process finds"
  try:
    _check_bits(directory, state, saved)
  except DamagedCheckpoint as error:
    return None, None, str(error)
  return state, data, None


def _check_bits(directory: str, tree: Any, saved: dict[str, int]):
  """Raises DamagedCheckpoint, naming the arrays, if their checksums are not the saved ones; without any, passes."""
  if not saved:
    return
  differing = [name for name, value in checksums(tree).items() if saved.get(name) != value]
  if differing:
    raise DamagedCheckpoint(
      f"{directory}: damaged checkpoint (other bits than were saved: {', '.join(differing)[:200]})"
    )


def _check_shapes(directory: str, metadata: Any, expected: Any):
  if metadata is None or metadata.tree is None:
    raise DamagedCheckpoint(f"{directory}: damaged checkpoint (its metadata is missing)")
  saved = _shapes_by_name(metadata.tree)
  for name, shape in _shapes_by_name(expected).items():
    if name not in saved:
      raise ValueError(f"{directory}: has no {name}; it was saved by a model of another kind: give its config")
    if saved[name] != shape:
      raise ValueError(f"{directory}: {name} has shape {saved[name]}, but the model expects {shape}: give its config")


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
  """{"params/blocks/qkv/kernel": shape, ...}, for any kind of containers."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
  return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _set_aside(manager: ocp.CheckpointManager, damaged: list[int]):
  """Moves checkpoints out of the way, so that their steps can be saved again."""
  if not damaged:
    return
  if distributed.process_index_and_count()[0] == 0:
    target = os.path.join(os.path.dirname(manager.directory), DAMAGED)
    os.makedirs(target, exist_ok=True)
    for step in damaged:
      earlier = [name for name in os.listdir(target) if name.split(".")[0] == str(step)]
      name = f"{step}.{len(earlier)}" if earlier else str(step)
      shutil.move(os.path.join(manager.directory, str(step)), os.path.join(target, name))
  log.warning("checkpoints of steps %s are moved to %s, and the one before them is used", damaged, DAMAGED)
  distributed.wait_for_all(f"checkpoints {damaged} set aside")
  manager.reload()


def _on_first_device(shapes: Any) -> Any:
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)


def _uncommitted(tree: Any) -> Any:
  """The same arrays, which JAX may move to the devices of others in one computation, such as those of a mesh."""
  return jax.tree.map(jnp.asarray, jax.device_get(tree))


def _partial_restore(placed: Any) -> ocp.args.PyTreeRestore:
  """Arguments that restore only the arrays of `placed`, with their shardings."""
  restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
  return ocp.args.PyTreeRestore(placed, restore_args=restore_args, partial_restore=True)


# ---------------------------------------------------------------- errors


@contextlib.contextmanager
def _read_errors(directory: str) -> Iterator[None]:
  """Turns errors of Orbax and tensorstore on damaged files into a DamagedCheckpoint of one line."""
  try:
    yield
  except (ValueError, KeyError, OSError, AttributeError) as error:
    raise DamagedCheckpoint(f"{directory}: damaged checkpoint ({_reason(error)})") from error


@contextlib.contextmanager
def _write_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
  """Turns errors of Orbax and tensorstore, some of them late, into an OSError with the complete checkpoints."""
  try:
    yield
  except (ValueError, OSError, RuntimeError) as error:
    if distributed.is_lost_process(error):
      raise
    finished = steps(os.path.dirname(manager.directory))
    remedy = "make room" if re.search("No space|quota", str(error)) else "mend that"
    raise OSError(
      f"{manager.directory}: a checkpoint could not be written ({_reason(error)}). Those of steps {finished} are "
      f"complete: {remedy}, and start again"
    ) from error


def _reason(error: Exception) -> str:
  """An error in one line; the runtime's have the attempt at the beginning and the cause at the end."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) <= 200 else f"{line[:100]} … {line[-100:]}"


# ---------------------------------------------------------------- checksums


def checksums(tree: Any) -> dict[str, int]:
  """{path: checksum} of a tree of arrays, independent of their devices and sharding.

  Computed on the devices: the sum modulo 2³² of a hash of every word and its position (the finalizer of MurmurHash3).
  One changed word always changes it, several go unnoticed once in four billion times.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  values = jax.device_get(_sums([leaf for _, leaf in leaves]))
  return {path_name(path): int(value) for (path, _), value in zip(leaves, values)}


def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  sharding = leaves[0].sharding
  if isinstance(sharding, NamedSharding):  # every process needs the numbers
    return jax.jit(_all, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(leaves)
  return jax.jit(_all)(leaves)


def _all(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_checksum(leaf) for leaf in leaves]


def _checksum(leaf: jax.Array) -> jax.Array:
  bits = leaf if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, UNSIGNED[leaf.dtype.itemsize])
  words = bits.astype(jnp.uint32)
  # Positions of words are sums over axes: one long axis could not keep the array's sharding.
  strides = [math.prod(leaf.shape[axis + 1 :]) for axis in range(leaf.ndim)]
  offsets = [jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(s) for axis, s in enumerate(strides)]
  h = words ^ (sum(offsets, jnp.ones(leaf.shape, jnp.uint32)) * jnp.uint32(0x9E3779B9))
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    h = (h ^ (h >> shift)) * jnp.uint32(factor)
  return jnp.sum(h, dtype=jnp.uint32)
