"""The devices of this process, and the other processes of the run."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqm_jax import hardware
from eqm_jax.progress import Progress

log = logging.getLogger(__name__)

# Messages of gloo, NCCL and gRPC when the other end is gone.
LOST = re.compile(r"[Cc]onnection (closed|reset|refused)|[Ss]ocket closed|remote process exited|heartbeat timeout")
FORCED_DEVICES = "--xla_force_host_platform_device_count"
TEXT_BYTES = 4096  # length of a text that processes exchange


@contextlib.contextmanager
def initialized(
  coordinator_address: str | None, num_processes: int | None, process_id: int | None, saves: bool = False
) -> Iterator[None]:
  """Joins the other processes of the run, if there are any, while the block runs.

  Without arguments they are found through a TPU's metadata, SLURM, Open MPI or GKE; without those there is one process.
  An error in one process ends it at once, so that the others notice: an orderly exit would wait for them, while they
  wait for it in a collective.

  Args:
    coordinator_address: "host:port" of the first process.
    num_processes: number of processes in the run.
    process_id: number of this one, from 0.
    saves: whether the block checks for preemption (training.preemption) and saves after SIGTERM. Otherwise SIGTERM ends
      the process, as in a run of one process.

  Raises:
    ValueError: if only some of the three are given, or they do not fit.
  """
  arguments = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
  missing = [f"--{name}" for name, value in arguments.items() if value is None]
  if 0 < len(missing) < 3:
    raise ValueError(f"{' and '.join(missing)} not given: several processes need all three, or none to find each other")
  if not missing and not (":" in coordinator_address and 0 <= process_id < num_processes):
    values = " ".join(f"--{name}={value}" for name, value in arguments.items())
    raise ValueError(f"{values}: give HOST:PORT, and process_id from 0 to num_processes − 1")
  jax.config.update("jax_enable_preemption_service", saves)
  try:
    jax.distributed.initialize(coordinator_address, num_processes, process_id)
  except ValueError as error:
    if not missing or "coordinator_address" not in str(error):  # JAX's message when it has found no other processes
      raise
  try:
    yield
  except BaseException as error:
    if jax.process_count() == 1:
      raise
    traceback = "EQM_JAX_TRACEBACK" in os.environ
    log.error("process %d of %d: %s", *process_index_and_count(), _summary(error), exc_info=traceback)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def is_lost_process(error: BaseException) -> bool:
  """Whether the runtime reports by this error that another process cannot be reached."""
  return bool(re.match("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED", str(error)) or LOST.search(str(error)))


def _summary(error: BaseException) -> str:
  """An error in one line."""
  text = (str(error).strip() or type(error).__name__).splitlines()[0]
  if is_lost_process(error):
    return f"the other processes cannot be reached any more, one of them ended; its own output has the reason ({text})"
  if isinstance(error, ValueError | FloatingPointError | OSError):
    return f"error: {text}"
  return f"error: {type(error).__name__}: {text}"


def local_mesh() -> Mesh:
  """All devices of this process along one axis, `data`."""
  return Mesh(np.asarray(jax.local_devices()), ("data",))


def replicate(tree: Any) -> Any:
  """Arrays, complete on every device of this process."""
  return jax.device_put(tree, NamedSharding(local_mesh(), PartitionSpec()))


def shard(tree: Any) -> Any:
  """Arrays, sharded over the devices of this process along their first axis."""
  return jax.device_put(tree, NamedSharding(local_mesh(), PartitionSpec("data")))


def in_batches(function: Callable, array: np.ndarray, batch_size: int, progress: str = "") -> Any:
  """Applies `function` batch by batch, on all devices of this process.

  Every device gets `batch_size` rows at a time, so that the result of a row does not depend on the number of
  devices; the last batch is padded, so that one shape is compiled.

  Args:
    function: an array of rows, sharded over the devices → a tree of arrays with as many rows.
    array: [N, ...], N at least 1.
    batch_size: rows on each device.
    progress: description of a progress bar; "": there is none.

  Returns:
    The tree, as numpy arrays [N, ...].
  """
  size = batch_size * jax.local_device_count()
  batches = []
  with Progress(total=len(array), desc=progress, unit="row", disable=not progress) as bar:
    for first in range(0, len(array), size):
      rows = array[first : first + size]
      padded = np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])
      results = jax.device_get(function(shard(padded)))
      batches.append(jax.tree.map(lambda leaf, count=len(rows): leaf[:count], results))
      bar.update(len(rows))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def process_index_and_count() -> tuple[int, int]:
  """Index of this process in the run, and the number of processes."""
  return jax.process_index(), jax.process_count()


def wait_for_all(name: str):
  """Returns when every process of the run has called it with the same `name`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def check_same(name: str, value: int | None):
  """Refuses a number that differs between processes.

  Raises:
    ValueError: with its name, and the numbers.
  """
  values = from_all(np.asarray([-1 if value is None else value], np.int64))[:, 0].tolist()
  if len(set(values)) > 1:
    raise ValueError(f"{name} is not the same in all processes, but {values}: do all of them use the same disk?")


def from_first(tree: Any) -> Any:
  """The first process's tree of float32 arrays."""
  if jax.process_count() == 1:
    return tree
  return jax.device_get(multihost_utils.broadcast_one_to_all(tree))


def from_all(array: np.ndarray) -> np.ndarray:
  """The arrays of all processes, [processes, ...], with the same bits: JAX itself would round float64."""
  if jax.process_count() == 1:
    return array[None]
  words = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint32))
  return np.frombuffer(np.ascontiguousarray(words).tobytes(), array.dtype).reshape(-1, *array.shape)


def computed_with() -> list[str]:
  """Everything but the program that the bits of results depend on: one entry for each kind of process in the run.

  Versions, kind of device and compiler flags; for CPUs also the processor and the number of threads. The result is the
  same in every process; all must call it.
  """
  device = jax.local_devices()[0]
  parts = [f"jax {jax.__version__}", f"jaxlib {jaxlib.__version__}", device.device_kind]
  if device.platform == "cpu":
    parts += [str(hardware.processor()), f"{hardware.xla_cpu_threads(jax.local_device_count())} threads"]
  flags = os.environ.get("XLA_FLAGS", "").split()
  parts += sorted(flag for flag in flags if not flag.startswith(FORCED_DEVICES))  # included in the threads
  text = ", ".join(parts).encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
  return sorted({one.tobytes().decode(errors="ignore").rstrip() for one in from_all(np.frombuffer(text, np.uint8))})
