"""The data sets that a config can name."""

import inspect
from typing import Any

from eqm_jax import checks
from eqm_jax.data import arrays, builtin, latents, on_disk, openmoji
from eqm_jax.data.samples import Source

SOURCES = {
  "digits": builtin.digits,
  "mnist": builtin.mnist,
  "photographs": builtin.photographs,
  "openmoji": openmoji.openmoji,
  "plane": builtin.plane,
  "folder": on_disk.Folder,
  "tfds": on_disk.Tfds,
  "npz": arrays.npz,
  "latents": latents.Latents,
}


def open_source(name: str, options: dict[str, Any]) -> Source:
  """The data set `name`, opened with `options`, the arguments of its function or class.

  Raises:
    ValueError: if the name or an option is unknown, a file is missing or damaged, or a label is outside the classes.
  """
  checks.one_of("data.source", name, SOURCES)
  signature = inspect.signature(SOURCES[name])
  try:
    signature.bind(**options)
  except TypeError as error:
    raise ValueError(
      f"data.options = {options} do not fit the source {name!r} ({error}): "
      f"it takes {', '.join(signature.parameters) or 'none'}"
    ) from error
  return SOURCES[name](**options)
