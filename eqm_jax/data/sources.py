"""Opens the data set that a config names."""

import inspect
from typing import Any

from eqm_jax.data import latents, shipped, stored
from eqm_jax.data.samples import Source

SOURCES = {
  "digits": shipped.digits,
  "mnist": shipped.mnist,
  "photographs": shipped.photographs,
  "plane": shipped.plane,
  "folder": stored.Folder,
  "tfds": stored.Tfds,
  "npz": stored.npz,
  "latents": latents.Latents,
}


def open_source(name: str, options: dict[str, Any]) -> Source:
  """The data set `name`, with the arguments of its function or class.

  Raises:
    ValueError: if the name or an option is not known, a file is missing or damaged, or a
      label is outside the classes.
  """
  if name not in SOURCES:
    raise ValueError(f"data.source = {name!r} is not known: choose one of {', '.join(SOURCES)}")
  try:
    inspect.signature(SOURCES[name]).bind(**options)
  except TypeError as error:
    parameters = ", ".join(inspect.signature(SOURCES[name]).parameters) or "none"
    raise ValueError(
      f"data.options {options} do not fit source {name!r}, which takes: {parameters} ({error})"
    ) from error
  return SOURCES[name](**options)
