"""Read-outs of γ as files: an .npz of two arrays, and the weights that they were fitted to."""

import os
import zipfile

import numpy as np

from eqm_jax.equilibrium import noise_level
from eqm_jax.equilibrium.noise_level import NoiseReadout
from eqm_jax.equilibrium.pytrees import Model, Params
from eqm_jax.io import atomic_write
from eqm_jax.trees import fingerprint

ARRAYS = ("weights", "bias", "sha256")
REMEDY = "fit one with --mode=readout"


def load_readout(path: str | os.PathLike, model: Model, params: Params) -> NoiseReadout:
  """Loads a read-out of γ, for `eqm_jax.field(model, params, readout=...)`.

  Args:
    path: a readout.npz that `--mode=readout` has written.
    model, params: what it was fitted to.

  Raises:
    ValueError: if there is no such file, it is damaged or something else, or it was fitted to other weights.
  """
  return read(path, model, fingerprint(params))


def read(path: str | os.PathLike, model: Model, sha256: str | None) -> NoiseReadout:
  """`load_readout` for weights with this fingerprint; None: they are not known yet, and not compared.

  Raises:
    ValueError: as `load_readout`.
  """
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise ValueError(f"{path}: no such file: {REMEDY}, and give its readout.npz")
  try:
    with np.load(path) as file:
      weights, bias, saved = (file[name] for name in ARRAYS)
  except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path}: not a read-out, or damaged ({error}): {REMEDY}") from error
  readout = NoiseReadout(weights, bias)
  try:
    noise_level.check_model(model, readout=readout)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  if sha256 not in (None, str(saved)):
    raise ValueError(
      f"{path}: fitted to other weights (sha256 {str(saved)[:12]}) than the model's ({sha256[:12]}): {REMEDY} to these"
    )
  return readout


def save(path: str, readout: NoiseReadout, params: Params):
  """Writes a read-out of the model with these parameters."""
  with atomic_write(path) as file:
    np.savez(file, weights=readout.weights, bias=readout.bias, sha256=fingerprint(params))
