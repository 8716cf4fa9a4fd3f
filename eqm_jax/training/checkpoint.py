"""Every call of Orbax: the checkpoints of a run, and plain directories of parameters.

A checkpoint holds `state` (step, params, ema_params, opt_state) and `data` (the
position of the input iterator, the same on every process), so that a resumed run ends with the bits of one
that was never stopped. Orbax writes a checkpoint aside and renames it, so a killed
save leaves the previous ones whole.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

DIRECTORY = "checkpoints"


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
  handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
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
  """Starts saving; returns once the device's arrays are copied and may be donated."""
  args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(iterator.get_state()))
  # `force`: the caller decides when to save.
  manager.save(step, args=args, force=True)


def restore(manager: ocp.CheckpointManager, step: int, shapes: Any, iterator: grain.DatasetIterator) -> Any:
  """The state saved at `step`, placed as `shapes` (ShapeDtypeStructs with shardings) says.

  Sets the iterator back to where it was.

  Raises:
    ValueError: if the checkpoint holds other arrays than `shapes`.
  """
  state_args = ocp.args.PyTreeRestore(shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes))
  directory = f"{manager.directory}/{step}"
  with _naming(directory):
    metadata = manager.item_metadata(step).state
  _check_shapes(directory, metadata, shapes)
  with _naming(directory):
    restored = manager.restore(step, args=ocp.args.Composite(state=state_args, data=ocp.args.JsonRestore()))
  iterator.set_state(restored.data)
  return restored.state


def steps(workdir: str) -> list[int]:
  """The steps of a run's finished checkpoints, ascending."""
  if not os.path.isdir(os.path.join(workdir, DIRECTORY)):
    return []
  with contextlib.closing(open_manager(workdir)) as manager:
    return sorted(manager.all_steps())


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
  step = there[-1] if step is None else step
  with contextlib.closing(open_manager(workdir)) as manager:
    directory = f"{manager.directory}/{step}"
    with _naming(directory):
      metadata = manager.item_metadata(step).state
    _check_shapes(directory, metadata, {name: shapes})
    with _naming(directory):
      return manager.restore(step, args=ocp.args.Composite(state=_partial_restore({name: shapes}))).state[name], step


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
      return checkpointer.restore(directory, args=_partial_restore(shapes))


def _partial_restore(shapes: Any) -> ocp.args.PyTreeRestore:
  """Asks for the arrays in `shapes`, of all that a checkpoint holds, on the first device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
  restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
  return ocp.args.PyTreeRestore(placed, restore_args=restore_args, partial_restore=True)


@contextlib.contextmanager
def _naming(directory: str) -> Iterator[None]:
  """Names the checkpoint in whatever goes wrong with it, in one line."""
  try:
    yield
  except (ValueError, KeyError, OSError, AttributeError) as error:  # what Orbax and tensorstore raise on damaged files
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    raise ValueError(f"{directory}: damaged checkpoint ({reason}). Remove it, and the one before it is used") from error


def _check_shapes(directory: str, metadata: Any, expected: Any):
  if metadata is None or metadata.tree is None:
    raise ValueError(f"{directory}: a damaged checkpoint: its metadata is missing")
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
