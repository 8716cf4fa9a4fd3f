"""The devices of this process, and the other processes of the run."""

import contextlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eqm_jax import hardware, launchers
from eqm_jax.progress import Progress

log = logging.getLogger(__name__)

# Messages of gloo, NCCL and gRPC when the other end is gone.
LOST = re.compile(r"[Cc]onnection (closed|reset|refused)|[Ss]ocket closed|remote process exited|heartbeat timeout")
FORCED_DEVICES = "--xla_force_host_platform_device_count"
TEXT_BYTES = 4096  # length of a text that processes exchange
NOTICE_SECONDS = 5  # of waiting for the other processes, until a line says so
WAIT_SECONDS = 300  # until the run ends without them
ALONE = "Start them, or give --num_processes=1 to run without them"


@contextlib.contextmanager
def initialized(
  coordinator_address: str | None, num_processes: int | None, process_id: int | None, saves: bool = False
) -> Iterator[None]:
  """Joins the other processes of the run, if there are any, while the block runs.

  Without arguments they are found through Open MPI, SLURM, a TPU's metadata or Kubernetes; without those there is one
  process. `num_processes` = 1 looks for no others. Where this process has called `jax.distributed.initialize`, that
  stays as it is, and where it has used JAX without it, it is the only one.
  An error in one process ends it at once, so that the others notice: an orderly exit would wait for them, while they
  wait for it in a collective.

  Args:
    coordinator_address: "host:port" of the first process.
    num_processes: number of processes in the run.
    process_id: number of this one, from 0.
    saves: whether the block checks for preemption (training.preemption) and saves after SIGTERM. Otherwise SIGTERM ends
      the process, as in a run of one process.

  Raises:
    ValueError: if only some of the three are given, they do not fit, the other processes are not found, or JAX finds no
      device.
  """
  arguments = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
  joins = not jax.distributed.is_initialized() and _check_arguments(arguments)
  if joins:
    jax.config.update("jax_enable_preemption_service", saves)
    _join(arguments)
  check_devices()
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
  if joins:
    jax.distributed.shutdown()


def _check_arguments(arguments: dict[str, Any]) -> bool:
  """Whether there may be other processes."""
  missing = [f"--{name}" for name, value in arguments.items() if value is None]
  if arguments["num_processes"] == 1:
    return False
  if 0 < len(missing) < 3:
    raise ValueError(
      f"{' and '.join(missing)} not given: several processes need all three, or none to find each other; "
      "--num_processes=1 runs one alone"
    )
  if missing:
    reason = launchers.alone()
    if reason:
      log.info("this process runs alone: %s", reason)
    return reason is None
  if not (":" in arguments["coordinator_address"] and 0 <= arguments["process_id"] < arguments["num_processes"]):
    values = " ".join(f"--{name}={value}" for name, value in arguments.items())
    raise ValueError(f"{values}: give HOST:PORT, and process_id from 0 to num_processes − 1")
  return True


def _join(arguments: dict[str, Any]):
  """Connects to the other processes; returns without, where JAX finds none."""
  given = arguments["coordinator_address"] is not None
  values = arguments if given else launchers.variables()
  others = ", ".join(f"{name}={value}" for name, value in values.items()) or "by the metadata of the TPU"
  try:
    with _waiting(others):
      jax.distributed.initialize(**arguments, initialization_timeout=WAIT_SECONDS + 60)
  except Exception as error:  # of JAX, or of the clients of a cluster's services
    reason = _first_line(error)
    if "before any JAX calls" in reason:
      if given:
        raise ValueError(f"{others}: this process has used JAX without the others: call this before that") from error
      return
    if not given and "coordinator_address" in reason:  # nothing tells of others
      return
    if not values and isinstance(error, OSError):
      log.warning("this process runs alone: the metadata of the TPU cannot be reached (%s)", reason)
      return
    raise ValueError(f"the other processes of the run are not found ({others}): {reason}. {ALONE}") from error


@contextlib.contextmanager
def _waiting(others: str) -> Iterator[None]:
  """Says in one line that the block waits for other processes, and ends the process if that takes too long.

  JAX would abort with a stack trace, and until then react to no Ctrl-C.
  """
  done = threading.Event()

  def tell():
    who = f"the other processes of the run ({others})"
    if not done.wait(NOTICE_SECONDS):
      log.warning("waiting for %s, %d seconds at most. %s", who, WAIT_SECONDS, ALONE)
    if not done.wait(WAIT_SECONDS - NOTICE_SECONDS):
      log.error("error: %s did not come in %d seconds. %s", who, WAIT_SECONDS, ALONE)
      os._exit(1)

  threading.Thread(target=tell, name="waiting", daemon=True).start()
  is_main = threading.current_thread() is threading.main_thread()
  previous = signal.signal(signal.SIGINT, signal.SIG_DFL) if is_main else None
  try:
    yield
  finally:
    done.set()
    if previous is not None:
      signal.signal(signal.SIGINT, previous)


def check_devices():
  """Starts JAX's devices.

  Raises:
    ValueError: if there are none of the kind that JAX_PLATFORMS names.
  """
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    raise ValueError(
      f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX finds no such device ({_first_line(error)}). "
      "Set another, or unset it"
    ) from error


def is_lost_process(error: BaseException) -> bool:
  """Whether the runtime reports by this error that another process cannot be reached."""
  return bool(re.match("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED", str(error)) or LOST.search(str(error)))


def _summary(error: BaseException) -> str:
  """An error in one line."""
  text = _first_line(error)
  if is_lost_process(error):
    return f"the other processes cannot be reached any more, one of them ended; its own output has the reason ({text})"
  if isinstance(error, ValueError | FloatingPointError | OSError):
    return f"error: {text}"
  return f"error: {type(error).__name__}: {text}"


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def local_mesh() -> Mesh:
  """All devices of this process along one axis, `data`."""
  return Mesh(np.asarray(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))


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
  with Progress(total=len(array), desc=progress, disable=not progress) as bar:
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
