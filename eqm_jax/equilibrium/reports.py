"""Progress of a jitted loop, reported to a function of the host while the device goes on."""

import itertools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from eqm_jax.equilibrium.pytrees import is_traced

Progress = Callable[[int], Any]  # takes the units done since it was last called
REPORTS = 100  # of a whole loop, about: each takes the host some microseconds

# Programs call `_dispatch`, which finds the caller's function by number: a new function compiles nothing anew.
_numbers = itertools.count()
_listeners: dict[int, Progress] = {}


@flax.struct.dataclass
class Reporter:
  """Where a loop reports to, as an argument of jitted functions."""

  number: jax.Array  # int32: of the listener
  every: jax.Array  # int32: units in one report


def reporting(progress: Progress | None, total: Any, run: Callable[[Reporter | None], Any]) -> Any:
  """`run(reporter)`, whose loop of `total` units reports to `progress`; with None it gets None, and reports nothing.

  Returns when all has been reported. Inside jit or vmap the compiled program reports, whenever it runs.
  """
  if progress is None:
    return run(None)
  number, traced = next(_numbers), False
  _listeners[number] = progress
  try:
    result = run(Reporter(jnp.int32(number), jnp.maximum(1, jnp.int32(total) // REPORTS)))
    traced = is_traced(result)
    if not traced:
      jax.effects_barrier()
    return result
  finally:
    if not traced:
      del _listeners[number]


def report(reporter: Reporter | None, before: jax.Array, after: jax.Array):
  """Reports from within a loop that `after` units are done, where `before` were."""
  if reporter is not None:
    due = (after // reporter.every - before // reporter.every) * reporter.every
    jax.lax.cond(due > 0, lambda: jax.debug.callback(_dispatch, reporter.number, due), lambda: None)


def report_rest(reporter: Reporter | None, count: jax.Array):
  """Reports, at the end of a loop, what of its `count` units `report` has kept back."""
  if reporter is not None:
    jax.debug.callback(_dispatch, reporter.number, count % reporter.every)


def _dispatch(number: jax.Array, count: jax.Array):
  listener = _listeners.get(int(number))
  if listener is not None and count > 0:
    listener(int(count))
