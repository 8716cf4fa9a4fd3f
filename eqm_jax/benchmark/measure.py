"""The instruments of a benchmark: timer, compiler, memory gauge, and the matrix-product peak of the machine."""

import contextlib
import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SHORTEST_TURN = 0.1  # seconds: quicker functions are called several times in a turn, or the clock would show
LONGEST_CASE = 60.0  # seconds after which no further turn begins, however many were asked for
MOST_CALLS = 500  # in one turn
# Sides of the square products: the rate of the smaller one is higher where the larger one outgrows the caches.
PRODUCT_SIDES = {"cpu": (1024, 2048), "other": (4096, 8192)}


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds of one call, for each turn of a measurement."""

  turns: tuple[float, ...]
  calls: int  # in each turn; a turn's seconds are divided by them

  @property
  def median(self) -> float:
    return statistics.median(self.turns)

  def divided(self, parts: float) -> "Timing":
    """The seconds of one of `parts` equal parts of a call."""
    return Timing(tuple(seconds / parts for seconds in self.turns), self.calls)


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function, the time its compilation took, and the memory it needs."""

  call: Callable
  compile_seconds: float  # tracing and lowering included
  bytes: int | None  # arguments, results and temporaries on one device; None where the compiler reports none


def compile_program(function: Callable, *arguments: Any, donate: Sequence[int] = ()) -> Program:
  """Compiles a function, jitted or not, for these arguments, which may be arrays or their shapes."""
  jitted = function if hasattr(function, "lower") else jax.jit(function, donate_argnums=donate)
  begin = time.perf_counter()
  compiled = jitted.lower(*arguments).compile()
  seconds = time.perf_counter() - begin
  return Program(compiled, seconds, _program_bytes(compiled))


def _program_bytes(compiled: jax.stages.Compiled) -> int | None:
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  # Results in the place of donated arguments are counted once.
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def timed(
  function: Callable, *arguments: Any, turns: int, carry: bool = False, warm_up: bool = True
) -> tuple[Timing, Any]:
  """Times calls of a function until their results are ready.

  Args:
    function: compiled already, or plain Python.
    arguments: of every call.
    turns: how many times are taken; fewer, but at least one, where they take more than LONGEST_CASE seconds.
    carry: the first argument of the next call is the first result of this one, as of a step that donates its state.
    warm_up: first call it once, untimed.

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
    if once > LONGEST_CASE / 4:  # slow functions vary little, and this call was warm already
      seconds.append(once)
  while len(seconds) < turns and (not seconds or sum(seconds) * calls < LONGEST_CASE):
    begin = time.perf_counter()
    result, arguments = run(calls, arguments)
    seconds.append((time.perf_counter() - begin) / calls)
  return Timing(tuple(seconds), calls), result


@contextlib.contextmanager
def peak_process_memory() -> Iterator[list[int]]:
  """Fills the list with the most memory, in bytes, that this process held at one time inside.

  Linux forgets the high-water mark of the resident set on request; where it does not, the list stays empty.
  """
  peak: list[int] = []
  try:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
      file.write("5")
    resets = True
  except OSError:
    resets = False
  yield peak
  if resets:
    with open("/proc/self/status", encoding="ascii") as file:
      peak.append(int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1]) * 1024)


def peak_device_memory(devices: Sequence[jax.Device]) -> int | None:
  """The most bytes that one of these devices has held so far; None for CPUs, which keep no count."""
  peaks = [stats["peak_bytes_in_use"] for device in devices if (stats := device.memory_stats())]
  return max(peaks) if peaks else None


def available_memory(devices: Sequence[jax.Device]) -> int | None:
  """Bytes that one device can still take; the devices of a CPU share its memory. None: unknown."""
  free = [
    stats["bytes_limit"] - stats["bytes_in_use"]
    for device in devices
    if (stats := device.memory_stats()) and "bytes_limit" in stats
  ]
  if free:
    return min(free)
  try:
    with open("/proc/meminfo", encoding="ascii") as file:
      available = int(re.search(r"MemAvailable:\s+(\d+) kB", file.read())[1]) * 1024
  except (OSError, TypeError):
    return None
  for limit, used in (  # of the container, version 2 and 1 of the kernel's interface
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
  ):
    with contextlib.suppress(OSError, ValueError), open(limit) as limit_file, open(used) as used_file:
      available = min(available, int(limit_file.read()) - int(used_file.read()))
  return available // len(devices)


def product_peak(precision: str, devices: Sequence[jax.Device], turns: int) -> dict[str, float]:
  """The highest rate of square matrix products on all these devices at once.

  Args:
    precision: "float32" or "bfloat16", the type of the factors; or "float32 exact", which accelerators compute
      without rounding the factors first.
    devices: of this process.
    turns: of each side length.

  Returns:
    flops_per_second, of all devices together, in the fastest turn; side, the length with which it was reached.
  """
  dtype = jnp.dtype(precision.split()[0])
  exact = jax.lax.Precision.HIGHEST if precision.endswith("exact") else None
  spread = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
  multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=exact), out_shardings=spread)
  best = {"flops_per_second": 0.0, "side": 0}
  for side in PRODUCT_SIDES.get(devices[0].platform, PRODUCT_SIDES["other"]):
    shape = (len(devices), side, side)
    factors = [jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype) for i in range(2)]
    timing, _ = timed(multiply, *(jax.device_put(factor, spread) for factor in factors), turns=turns)
    rate = len(devices) * 2 * side**3 / min(timing.turns)
    if rate > best["flops_per_second"]:
      best = {"flops_per_second": rate, "side": side}
  return best
