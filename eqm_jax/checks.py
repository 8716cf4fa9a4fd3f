"""Checks of options and arguments, with one form of message: `key = value must be ...: remedy`.

Values that JAX traces (inside jit or vmap) pass: they have no number yet.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax


def at_least(key: str, value: Any, minimum: float, remedy: str = ""):
  """Refuses a number below `minimum`, NaN and None.

  Args:
    key: what the user sets, such as "train.steps".
    value: the number.
    minimum: the smallest one that passes.
    remedy: what to do instead; "" where the bound says it.

  Raises:
    ValueError: with all three.
  """
  if not isinstance(value, jax.core.Tracer) and (value is None or not value >= minimum):
    _refuse(key, value, f"at least {minimum}", remedy)


def in_interval(
  key: str,
  value: Any,
  low: float,
  high: float,
  *,
  open_low: bool = False,
  open_high: bool = False,
  remedy: str = "",
):
  """Refuses a number outside the interval from `low` to `high`, NaN and None.

  Args:
    key: what the user sets.
    value: the number.
    low, high: the ends; math.inf for an end that is not bounded.
    open_low, open_high: whether the end itself is refused too.
    remedy: what to do instead; "" where the interval says it.

  Raises:
    ValueError: with the interval as "(0, 1]".
  """
  if isinstance(value, jax.core.Tracer):
    return
  number = math.nan if value is None else value
  above = number > low if open_low else number >= low
  below = number < high if open_high else number <= high
  if not (above and below):
    ends = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    _refuse(key, value, f"in {ends}", remedy)


def one_of(key: str, value: Any, choices: Iterable[Any], remedy: str = ""):
  """Refuses a value that is none of `choices`.

  Raises:
    ValueError: with all choices.
  """
  choices = list(choices)
  if value not in choices:
    _refuse(key, value, f"one of {', '.join(map(str, choices)) or 'none here'}", remedy)


def _refuse(key: str, value: Any, expected: str, remedy: str):
  raise ValueError(f"{key} = {value!r} must be {expected}" + (f": {remedy}" if remedy else ""))
