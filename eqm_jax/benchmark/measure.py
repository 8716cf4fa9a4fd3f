"""Instruments of a benchmark: timer, compiled programs, memory, and the matrix-product peak of the machine."""

import contextlib
import dataclasses
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eqm_jax.networks.dit import DiT
from eqm_jax.training import sharding

SHORTEST_TURN = 0.1  # seconds; faster functions are called several times in a turn, so that the clock is exact enough
LONGEST_CASE = 60.0  # seconds after which no further turn begins
MOST_CALLS = 500  # in one turn
# Sides of the square products: the rate of the smaller one is higher where the larger one outgrows the caches.
PRODUCT_SIDES = {"cpu": (1024, 2048), "other": (4096, 8192)}
MEMORY_REMEDY = (
  "make train.batch_size smaller, set model.remat to 'dots_no_batch' or 'full', split the batch with "
  "train.grad_accum_steps, or give the mesh more devices"
)
# Files of a container with its limit of memory and its use, by the kernel's interfaces of versions 2 and 1.
CGROUP_FILES = (
  ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
  ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds per call, one number for each turn of a measurement."""

  turns: tuple[float, ...]
  calls: int = 1  # in each turn

  @property
  def median(self) -> float:
    return statistics.median(self.turns)

  def divided(self, parts: float) -> "Timing":
    """Seconds of one of `parts` equal parts of a call."""
    return Timing(tuple(seconds / parts for seconds in self.turns), self.calls)


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function, its compile time, and its memory."""

  call: Callable
  compile_seconds: float  # tracing and lowering included
  bytes: int | None  # arguments, results and temporaries on one device; None where the compiler reports none


def compile_program(function: Callable, *arguments: Any) -> Program:
  """Compiles a function, jitted or not, for arguments that may be arrays or their shapes."""
  jitted = function if hasattr(function, "lower") else jax.jit(function)
  begin = time.perf_counter()
  compiled = jitted.lower(*arguments).compile()
  seconds = time.perf_counter() - begin
  memory = compiled.memory_analysis()
  if memory is None:
    return Program(compiled, seconds, None)
  # Results in the place of donated arguments are counted once.
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Program(compiled, seconds, memory.argument_size_in_bytes + results + memory.temp_size_in_bytes)


def timed(
  function: Callable, *arguments: Any, turns: int, carry: bool = False, warm_up: bool = True
) -> tuple[Timing, Any]:
  """Times calls of a function until their results are ready.

  Args:
    function: a compiled function, or plain Python.
    arguments: of every call.
    turns: number of turns; fewer, but at least one, where they take more than LONGEST_CASE seconds.
    carry: the first argument of a call is the first result of the previous one, as in a step that donates its state.
    warm_up: begins with an untimed call.

  Returns:
    The times, and the result of the last call.
  """

  def run(calls: int, arguments: tuple) -> tuple[Any, tuple]:
    result = None
    for _ in range(calls):
      result = function(*arguments)
      arguments = (result[0], *arguments[1:]) if carry else arguments
    jax.block_until_ready(result)
    return result, arguments

  calls, seconds, result = 1, [], None
  if warm_up:
    _, arguments = run(1, arguments)
    begin = time.perf_counter()
    result, arguments = run(1, arguments)
    once = time.perf_counter() - begin
    calls = min(MOST_CALLS, max(1, math.ceil(SHORTEST_TURN / once)))
    if once > LONGEST_CASE / 4:  # slow functions vary little, and this call was warm
      seconds.append(once)
  while len(seconds) < turns and (not seconds or sum(seconds) * calls < LONGEST_CASE):
    begin = time.perf_counter()
    result, arguments = run(calls, arguments)
    seconds.append((time.perf_counter() - begin) / calls)
  return Timing(tuple(seconds), calls), result


def product_peak(precision: str, devices: Sequence[jax.Device], turns: int) -> dict[str, float]:
  """The highest `flops_per_second` of square matrix products on all devices together, and its `side`.

  `precision` is the type of the factors, "float32" or "bfloat16"; or "float32 exact", for which accelerators do not
  round them.
  """
  highest = jax.lax.Precision.HIGHEST if precision.endswith("exact") else None
  mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("data"))
  multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=highest), out_shardings=split)
  best = {"flops_per_second": 0.0, "side": 0}
  for side in PRODUCT_SIDES.get(devices[0].platform, PRODUCT_SIDES["other"]):
    shape = (len(devices), side, side)
    factors = [jax.random.normal(jax.random.key(i), shape).astype(precision.split()[0]) for i in range(2)]
    timing, _ = timed(multiply, *jax.device_put(factors, split), turns=turns)
    rate = len(devices) * 2 * side**3 / min(timing.turns)
    if rate > best["flops_per_second"]:
      best = {"flops_per_second": rate, "side": side}
  return best


@contextlib.contextmanager
def peak_process_memory() -> Iterator[list[int]]:
  """Fills the list with the peak memory of this process, in bytes, inside the context.

  Linux resets the high-water mark of the resident set on request; elsewhere the list stays empty.
  """
  peak: list[int] = []
  try:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    resets = True
  except OSError:
    resets = False
  yield peak
  if resets:
    peak.append(_kilobytes("/proc/self/status", "VmHWM") * 1024)


def _kilobytes(path: str, key: str) -> int:
  return int(re.search(rf"{key}:\s+(\d+) kB", pathlib.Path(path).read_text())[1])


def peak_device_memory(devices: Sequence[jax.Device]) -> int | None:
  """The largest peak of the devices' memory so far, in bytes; None for CPUs, which keep no count."""
  stats = [device.memory_stats() for device in devices]
  return max((one["peak_bytes_in_use"] for one in stats if one), default=None)


def available_memory(devices: Sequence[jax.Device]) -> int | None:
  """Free bytes of one device, or None if unknown; the devices of a CPU share its memory."""
  stats = [device.memory_stats() or {} for device in devices]
  free = [one["bytes_limit"] - one["bytes_in_use"] for one in stats if "bytes_limit" in one]
  if free:
    return min(free)
  try:
    available = _kilobytes("/proc/meminfo", "MemAvailable") * 1024
  except (OSError, TypeError):
    return None
  for limit, used in CGROUP_FILES:
    with contextlib.suppress(OSError, ValueError):
      available = min(available, int(pathlib.Path(limit).read_text()) - int(pathlib.Path(used).read_text()))
  return available // len(devices)


def fits(required: int | None, available: int | None) -> bool:
  """Whether a device has the required bytes; true where one of the numbers is unknown."""
  return required is None or available is None or required <= available


def check_fits(what: str, required: int | None, available: int | None):
  """Raises ValueError if a device has less than the required bytes."""
  if not fits(required, available):
    sizes = f"{required / 2**30:.2f} GiB on each device, but {available / 2**30:.2f} GiB are available"
    raise ValueError(f"{what} needs about {sizes}: {MEMORY_REMEDY}")


def check_training_memory(
  config: ml_collections.ConfigDict, shapes: Any, shardings: Any, devices: Sequence[jax.Device]
) -> dict[str, int | None]:
  """Refuses, before anything is compiled, a training step that cannot fit the memory.

  `shapes` and `shardings` are those of the training state. Returns `estimate` and `available`, bytes of one device.
  """
  mesh = jax.tree.leaves(shardings)[0].mesh
  samples = sharding.samples_on_device(mesh, config.train.batch_size) / config.train.grad_accum_steps
  activations = round(samples * activation_bytes(DiT(**config.model)) / mesh.shape["tensor"])
  state = sharding.held(shapes, shardings)
  gradient = sharding.held(shapes.params, shardings.params)
  estimate, available = state + gradient + activations, available_memory(devices)
  check_fits("the training step", estimate, available)
  return {"estimate": estimate, "available": available}


def activation_bytes(model: DiT) -> int:
  """A lower estimate of what the backward pass keeps of one sample, by formula.

  Of each block without rematerialisation: factors and results of its matrix products, and the attention weights before
  and after the softmax. With the policies "dots" and "dots_no_batch": what they name. With "full": the block's input.
  """
  T, D, size = (model.input_size // model.patch_size) ** 2, model.width, jnp.dtype(model.dtype).itemsize
  hidden = model.hidden_width * (2 if model.mlp == "swiglu" else 1)
  products = size * T * (5 * D + hidden)  # query, key, value, two results
  weights = size * model.num_heads * T * T
  policies = {"none": 2 * (products + weights), "dots": products + weights, "dots_no_batch": products}
  block = {**policies, "full": size * T * D}[model.remat]
  return model.depth * block * (1 if model.energy == "none" else 2)
