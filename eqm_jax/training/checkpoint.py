"""Every call of Orbax: the checkpoints of a run, and plain directories of parameters.

A checkpoint holds `state` (step, params, ema_params, opt_state), `data` (the
position of the input iterator, the same on every process), so that a resumed run ends with the bits of one
that was never stopped, and `checksums` of the arrays. Orbax writes a checkpoint aside and renames it, so a killed
save leaves the previous ones whole; where the newest is damaged on disk, the one before it is used.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from eqm_jax import devices
from eqm_jax.training.checksums import checksums

DIRECTORY = "checkpoints"
DAMAGED = "checkpoints_damaged"  # what a resumed run could not read, for whoever wants to look into it

log = logging.getLogger(__name__)


class DamagedCheckpoint(ValueError):
  """A checkpoint that is not what was saved."""


def open_manager(
  workdir: str, keep: int | None = None, best: Callable[[], int | None] = lambda: None
) -> ocp.CheckpointManager:
  """The checkpoints of a run: written asynchronously, the newest `keep` of them kept, and that of the step `best()`.

  Without `keep` nothing is made or removed, which is what a reader wants.
  """
  if keep is None:
    options = ocp.CheckpointManagerOptions(create=False)
  elif keep < 1:
    raise ValueError(f"checkpoint.keep = {keep} must be at least 1")
  else:
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
  with _writing(manager):
    manager.save(step, args=args, force=True)  # the caller decides when to save


@contextlib.contextmanager
def finishing(manager: ocp.CheckpointManager) -> Iterator[None]:
  """Ends with the last save on disk, and closes the manager.

  Raises:
    OSError: if it could not be written.
  """
  try:
    yield
    with _writing(manager):
      manager.wait_until_finished()
  finally:
    with contextlib.suppress(Exception):  # the error of a save, told above or less telling than the one on its way
      manager.close()


def preempted(manager: ocp.CheckpointManager, step: int) -> bool:
  """Whether all processes are to stop after this step, because one was sent SIGTERM."""
  return manager.reached_preemption(step)


def restore_newest(
  manager: ocp.CheckpointManager, shapes: Any, iterator: grain.DatasetIterator
) -> tuple[Any, int] | None:
  """The newest state that is whole, placed as `shapes` (ShapeDtypeStructs with shardings) says, and its step.

  Sets the iterator back to where it was. Newer checkpoints that are damaged are told in warnings and moved aside, since
  their steps will be saved again.

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
      f"{manager.directory}: no checkpoint can be read, of steps {damaged}, as told above. Nothing was changed: see to "
      "the disk, or choose another --workdir"
    )
  return None


def steps(workdir: str) -> list[int]:
  """The steps of a run's finished checkpoints, ascending. Waits for no other process."""
  return sorted(ocp.path.step.checkpoint_steps(os.path.join(workdir, DIRECTORY)))


def restore_params(workdir: str, name: str, shapes: Any, step: int | None = None) -> tuple[Any, int]:
  """One parameter tree, `params` or `ema_params`, of a run's checkpoint, on the first device; and the step.

  Args:
    step: of the checkpoint; None: the newest.

  Raises:
    ValueError: if the run has no such checkpoint, or one of a model of other shapes.
  """
  there = steps(workdir)
  if not there or step not in (None, *there):
    wanted = "" if step is None else f" of step {step}"
    raise ValueError(
      f"{workdir}: no finished checkpoint{wanted} in its {DIRECTORY}, there are {there or 'none'}; was it trained?"
    )
  placed = _on_first_device({name: shapes})
  candidates = sorted(there, reverse=True) if step is None else [step]
  for candidate in candidates:
    directory = os.path.join(os.path.abspath(workdir), DIRECTORY, str(candidate))
    try:
      state, _, saved = _read(directory, placed)
      _check_bits(directory, state, saved)
      return state[name], candidate
    except DamagedCheckpoint as error:
      if candidate == candidates[-1]:
        raise
      log.warning("%s. The one before it is used", error)


def write_tree(directory: str, tree: Any):
  """Writes a tree of arrays that Orbax alone can read back."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(os.path.abspath(directory), tree)


def read_tree(directory: str, shapes: Any) -> Any:
  """Reads a tree of arrays onto the first device.

  Raises:
    ValueError: if it is not there, is damaged, or has other shapes.
  """
  directory = os.path.abspath(directory)
  with ocp.PyTreeCheckpointer() as checkpointer:
    with _naming(directory):
      metadata = checkpointer.metadata(directory).item_metadata
    _check_shapes(directory, metadata, shapes)
    with _naming(directory):
      return checkpointer.restore(directory, args=_partial_restore(_on_first_device(shapes)))


def _read(directory: str, shapes: Any) -> tuple[Any, Any, dict[str, int]]:
  """(the arrays of `shapes`, the iterator's position, checksums) of a checkpoint, without waiting for other processes.

  Raises:
    DamagedCheckpoint: if it cannot be read.
    ValueError: if it holds other arrays.
  """
  path, handler, json = epath.Path(directory), ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
  with _naming(directory):
    metadata = handler.metadata(path / "state")
  _check_shapes(directory, metadata, shapes)
  with _naming(directory):
    state = handler.restore(path / "state", args=_partial_restore(shapes))
    data = json.restore(path / "data")
    there = (path / "checksums").exists()
    saved = json.restore(path / "checksums") if there else {}
  if not there:
    log.warning("%s: has no checksums, and is not compared with them", directory)
  return state, data, saved


def _read_together(directory: str, shapes: Any) -> tuple[Any, Any, str | None]:
  """(state, position, None), or what is damaged in the last place: the same verdict in every process."""
  state, data, saved, damage = None, None, {}, None
  try:
    state, data, saved = _read(directory, shapes)
  except DamagedCheckpoint as error:
    damage = str(error)
  # Each process has read its own part of the arrays: what one of them finds counts for all.
  if not devices.from_all(np.asarray([damage is None], np.uint32)).all():
    return None, None, damage or f"{directory}: damaged checkpoint, as another process finds"
  try:
    _check_bits(directory, state, saved)
  except DamagedCheckpoint as error:
    return None, None, str(error)
  return state, data, None


def _check_bits(directory: str, tree: Any, saved: dict[str, int]):
  """Raises DamagedCheckpoint, naming the arrays, if they are not those whose checksums were saved, if any were."""
  differing = [name for name, value in checksums(tree).items() if saved.get(name) != value] if saved else []
  if differing:
    raise DamagedCheckpoint(
      f"{directory}: damaged checkpoint (other bits than were saved: {', '.join(differing)[:200]})"
    )


def _set_aside(manager: ocp.CheckpointManager, damaged: list[int]):
  """Moves checkpoints out of the way, so that their steps can be saved again."""
  if not damaged:
    return
  if devices.process()[0] == 0:
    there = os.path.join(os.path.dirname(manager.directory), DAMAGED)
    os.makedirs(there, exist_ok=True)
    for step in damaged:
      before = [name for name in os.listdir(there) if name.split(".")[0] == str(step)]
      name = f"{step}.{len(before)}" if before else str(step)
      shutil.move(os.path.join(manager.directory, str(step)), os.path.join(there, name))
  log.warning("checkpoints of steps %s are moved to %s, and the one before them is used", damaged, DAMAGED)
  devices.wait_for_all(f"checkpoints {damaged} set aside")
  manager.reload()


def _on_first_device(shapes: Any) -> Any:
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)


def _partial_restore(placed: Any) -> ocp.args.PyTreeRestore:
  """Asks for the arrays in `placed`, of all that a checkpoint holds, where their shardings say."""
  restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
  return ocp.args.PyTreeRestore(placed, restore_args=restore_args, partial_restore=True)


@contextlib.contextmanager
def _naming(directory: str) -> Iterator[None]:
  """Names the checkpoint in whatever goes wrong with it, in one line."""
  try:
    yield
  except (ValueError, KeyError, OSError, AttributeError) as error:  # what Orbax and tensorstore raise on damaged files
    raise DamagedCheckpoint(f"{directory}: damaged checkpoint ({_reason(error)})") from error


@contextlib.contextmanager
def _writing(manager: ocp.CheckpointManager) -> Iterator[None]:
  """Names the directory, and what is whole in it, when something cannot be written."""
  try:
    yield
  except (ValueError, OSError, RuntimeError) as error:  # Orbax's and tensorstore's, some of them late
    if devices.tells_of_a_lost_process(error):
      raise
    finished = steps(os.path.dirname(manager.directory))
    remedy = "make room" if re.search("No space|quota", str(error)) else "mend that"
    raise OSError(
      f"{manager.directory}: a checkpoint could not be written ({_reason(error)}). Those of steps {finished} are "
      f"whole: {remedy}, and start again"
    ) from error


def _reason(error: Exception) -> str:
  """One line; the runtime's are long, with what was tried at the beginning and why it failed at the end."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) <= 200 else f"{line[:100]} … {line[-100:]}"


def _check_shapes(directory: str, metadata: Any, expected: Any):
  if metadata is None or metadata.tree is None:
    raise DamagedCheckpoint(f"{directory}: damaged checkpoint (its metadata is missing)")
  saved = _named(metadata.tree)
  for name, shape in _named(expected).items():
    if name not in saved:
      raise ValueError(f"{directory}: has no {name}; it was saved by a model of another kind")
    if saved[name] != shape:
      raise ValueError(f"{directory}: {name} has shape {saved[name]}, but the model expects {shape}")


def _named(tree: Any) -> dict[str, tuple[int, ...]]:
  """{"params/blocks/qkv/kernel": shape, ...}, whatever containers the tree is made of."""
  flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in flat}
