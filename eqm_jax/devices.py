"""This process's devices, and the other processes of the run."""

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
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqm_jax import hardware

log = logging.getLogger(__name__)

# What gloo, NCCL and gRPC say when the other end is gone.
LOST = re.compile(r"[Cc]onnection (closed|reset|refused)|[Ss]ocket closed|remote process exited|heartbeat timeout")
FORCED_DEVICES = "--xla_force_host_platform_device_count"
TEXT_BYTES = 4096  # of a text that processes exchange


@contextlib.contextmanager
def joined(
  coordinator_address: str | None, num_processes: int | None, process_id: int | None, saves: bool = False
) -> Iterator[None]:
  """Joins the other processes of the run, if there are any, for what is done inside.

  Without arguments they are found by what the machine says of itself: a TPU's metadata, SLURM, Open MPI or GKE; where
  it says nothing there is one process. An error in one process ends it at once, so that the others learn of it:
  an orderly exit would wait for them, while they wait for it in a collective.

  Args:
    coordinator_address: "host:port" of the first process.
    num_processes: of the run.
    process_id: of this one, from 0.
    saves: whether what is done inside asks, when SIGTERM has come, whether to save and end (training.stopping).
      Otherwise SIGTERM ends the process, as it does without others.

  Raises:
    ValueError: if only some of the three are given, or they do not fit.
  """
  given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if 0 < len(missing) < 3:
    raise ValueError(f"{' and '.join(missing)} not given: several processes are told all three, or find each other")
  if not missing and not (":" in coordinator_address and 0 <= process_id < num_processes):
    told = " ".join(f"--{name}={value}" for name, value in given.items())
    raise ValueError(f"{told}: give HOST:PORT, and process_id from 0 to num_processes − 1")
  jax.config.update("jax_enable_preemption_service", saves)
  try:
    jax.distributed.initialize(coordinator_address, num_processes, process_id)
  except ValueError as error:
    if not missing or "coordinator_address" not in str(error):  # which JAX says when it has found nothing
      raise
  try:
    yield
  except BaseException as error:
    if jax.process_count() == 1:
      raise
    log.error("process %d of %d: %s", *process(), _told(error), exc_info="EQM_JAX_TRACEBACK" in os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def tells_of_a_lost_process(error: BaseException) -> bool:
  """Whether this is how the runtime says that another process cannot be reached."""
  return bool(re.match("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED", str(error)) or LOST.search(str(error)))


def _told(error: BaseException) -> str:
  """One line of what went wrong."""
  text = (str(error).strip() or type(error).__name__).splitlines()[0]
  if tells_of_a_lost_process(error):
    return f"the other processes cannot be reached any more, one of them ended; its own output says why ({text})"
  if isinstance(error, ValueError | FloatingPointError | OSError):
    return f"error: {text}"
  return f"error: {type(error).__name__}: {text}"


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


def check_same(what: str, value: int | None):
  """Refuses to go on with a number that is not the same in every process.

  Raises:
    ValueError: naming what it is, and the numbers.
  """
  values = from_all(np.asarray([-1 if value is None else value], np.int64))[:, 0].tolist()
  if len(set(values)) > 1:
    raise ValueError(f"{what} is not the same in all processes, but {values}: are all at work on the same disk?")


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


def computed_with() -> list[str]:
  """What the bits of results depend on besides the program: one entry for each kind of process in the run.

  Versions, kind of device and compiler flags; of CPUs also the processor and the number of threads. The same in every
  process; all must call it.
  """
  device = jax.local_devices()[0]
  found = [f"jax {jax.__version__}", f"jaxlib {jaxlib.__version__}", device.device_kind]
  if device.platform == "cpu":
    found += [str(hardware.processor()), f"{hardware.xla_cpu_threads(jax.local_device_count())} threads"]
  flags = os.environ.get("XLA_FLAGS", "").split()
  found += sorted(flag for flag in flags if not flag.startswith(FORCED_DEVICES))  # these show in the threads
  text = ", ".join(found).encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
  return sorted({one.tobytes().decode(errors="ignore").rstrip() for one in from_all(np.frombuffer(text, np.uint8))})
