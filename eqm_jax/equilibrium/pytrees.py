"""Types, functions as pytrees, and checks that leave traced values alone: the ground of this folder.

A field or an energy is a pytree with a `__call__`, so that a jitted sampler takes it as an argument. Its class
compares and hashes by identity, as `jax.jit` and `jax.checkpoint` ask of a function.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Scalar = float | jax.Array
Params = Mapping[str, Any]  # nested dicts of arrays
FieldFn = Callable[[jax.Array], jax.Array]  # x [B, ...] → f [B, ...]
TWO_RESULTS = "the field returns (f, γ̂), and f alone is needed: make it without `readout`"


class Model(Protocol):
  """A network: `DiT` of this package, or any other with these names."""

  @property
  def num_classes(self) -> int: ...

  @property
  def input_shape(self) -> tuple[int, ...]: ...

  def apply(self, variables: Any, *args: Any) -> Any: ...


class ShortRepr:
  """A dataclass whose repr gives the shapes of its arrays, not their values."""

  def __repr__(self) -> str:
    parts = [f"{field.name}={summary(getattr(self, field.name))}" for field in dataclasses.fields(self)]
    return f"{type(self).__name__}({', '.join(parts)})"


def summary(value: Any) -> str:
  """One line about a value: "float32[4, 8, 8, 1]" for an array, names and sizes for trees and networks."""
  if isinstance(value, ShortRepr) or value is None or isinstance(value, bool | int | float | str):
    return repr(value)
  if hasattr(value, "shape") and hasattr(value, "dtype"):
    return f"{value.dtype}{list(value.shape)}"
  if isinstance(value, tuple) and len(value) <= 8:
    return f"({', '.join(map(summary, value))}{',' if len(value) == 1 else ''})"
  if isinstance(value, Mapping | list | tuple):
    leaves = [leaf for leaf in jax.tree.leaves(value) if hasattr(leaf, "shape")]
    if not leaves:
      return f"<{len(value)} entries>"
    return f"<{len(leaves)} arrays, {sum(math.prod(leaf.shape) for leaf in leaves):,} numbers>"
  name = getattr(value, "__name__", None) or type(value).__name__
  return f"<{name}>"


def as_pytree(function: Callable) -> Callable:
  """Wraps a plain function so that it can pass into jit as an argument; a pytree stays as it is."""
  if not jax.tree_util.all_leaves([function]):
    return function
  # jax would take the arguments of a functools.partial for leaves, and they need not be arrays.
  return jax.tree_util.Partial(function.__call__ if isinstance(function, functools.partial) else function)


def is_traced(*values: Any) -> bool:
  """Whether any leaf is a tracer, whose value a check cannot see. Whoever traces checks before."""
  return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def concrete(value: Any) -> Any:
  """A number that checks can compare while something else is traced: an array of one number as that number."""
  return np.asarray(value).item() if isinstance(value, jax.Array) and not is_traced(value) else value


def check_labels(labels: jax.Array, num_classes: int) -> jax.Array:
  """Labels as an array.

  Args:
    labels: integers [B], or [B, K] for K conditions a sample.
    num_classes: of the model; this number itself is the null class.

  Raises:
    ValueError: for another type or shape, or a class that the model does not have.
  """
  if not is_traced(labels):
    labels = np.asarray(labels)  # in numpy, which no trace records
    if labels.size and np.issubdtype(labels.dtype, np.integer):
      low, high = labels.min(), labels.max()
      if low < 0 or high > num_classes:
        raise ValueError(
          f"labels span {low}..{high}, but the model has the classes 0..{num_classes - 1}, "
          f"and {num_classes} for no class: give labels in this range"
        )
  if labels.ndim not in (1, 2) or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(
      f"labels are {labels.dtype}{list(labels.shape)}, but must be integers of shape [B] or [B, K]: "
      "convert them with jnp.asarray(labels, jnp.int32)"
    )
  return jnp.asarray(labels)
