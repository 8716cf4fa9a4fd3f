"""Labels to sample with, from the words of a config."""

import re
from collections.abc import Sequence

import numpy as np

from eqm_jax.equilibrium.pytrees import check_labels

WORDS = ("balanced", "random", "none")


def parse(key: str, spec: str | int | Sequence[int], count: int, num_classes: int, *, seed: int = 0) -> np.ndarray:
  """Labels of `count` samples, int32.

  Args:
    key: the config key of `spec`, for errors.
    spec: "balanced" (every class in turn), "random" (each class as likely as any other; a longer series begins with
      a shorter one), "none" (the null class), or labels that are taken in turn: a number, a sequence of numbers, or
      text such as "3", "0-4" or "1,5,7-9".
    count: number of labels.
    num_classes: of the model, whose null class has this number; a model without classes has only the null class.
    seed: of "random".

  Raises:
    ValueError: if `spec` is none of these, or a label does not exist.
  """
  if count < 1:
    raise ValueError(f"{key}: number of samples = {count} must be at least 1")
  if spec == "balanced":
    return np.arange(count, dtype=np.int32) % max(1, num_classes)
  if spec == "random":
    return np.random.default_rng(seed).integers(max(1, num_classes), size=count, dtype=np.int32)
  if spec == "none":
    return np.full(count, num_classes, np.int32)
  labels = _listed(key, spec) if isinstance(spec, str) else np.atleast_1d(np.asarray(spec))
  try:
    check_labels(labels, num_classes)
  except ValueError as error:
    raise ValueError(f"{key} = {spec!r}: {error}") from error
  return np.resize(labels.astype(np.int32), count)


def columns(spec: str | int | Sequence[int], num_classes: int) -> int:
  """Images in a row of a picture: one of each class, if labels as in `parse` take all in turn, and 5 to 12 exist."""
  return num_classes if spec == "balanced" and 5 <= num_classes <= 12 else 10


def names(num_classes: int, class_names: Sequence[str] | None = None) -> list[str]:
  """Words for the labels of a model, the null class at the end: with the names of the classes where they say more.

  Args:
    num_classes: of the model.
    class_names: in the order of the labels.
  """
  numbers = [str(label) for label in range(num_classes)]
  if class_names is None or list(class_names) == numbers or len(class_names) != num_classes:
    return [*(f"class {number}" for number in numbers), "no class"]
  return [*(f"{number} ({name})" for number, name in zip(numbers, class_names)), "no class"]


def _listed(key: str, text: str) -> np.ndarray:
  """Labels of a comma-separated list of numbers and ranges."""
  labels: list[int] = []
  for part in text.split(","):
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
    if not match or (match[2] and int(match[2]) < int(match[1])):
      raise ValueError(
        f"{key} = {text!r}: {part!r} is neither a label nor a range; give {', '.join(map(repr, WORDS))}, "
        "or a list such as '1,5,7-9'"
      )
    labels += range(int(match[1]), int(match[2] or match[1]) + 1)
  return np.asarray(labels)
