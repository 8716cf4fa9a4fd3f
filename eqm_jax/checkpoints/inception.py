"""Conversion of the published weights of the FID's Inception-v3 to the parameters of networks/inception.py.

The batch norm after each convolution is, in evaluation, a factor and a summand per channel: both are folded into the
convolution's kernel and bias, in float64.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from eqm_jax.checkpoints import torch_pickle
from eqm_jax.networks import inception

# In the project pytorch-fid's releases on GitHub under the tag fid_weights, in the format before PyTorch 1.6;
# torch-fidelity's release v0.2.0 has the same bytes as weights-inception-2015-12-05-6726825d.pth.
PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_BYTES = 95_628_359
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SOURCE = f"{PUBLISHED} of the GitHub releases of pytorch-fid, tag fid_weights"

EPSILON = 1e-3  # in every batch norm
NORM = ("weight", "bias", "running_mean", "running_var")

log = logging.getLogger(__name__)


def load(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
  """Loads the weights of the FID's Inception.

  Args:
    source: the published file, local, read without PyTorch and without running code; or {published name: array}. A file
      with other bytes but the same names and shapes is accepted with a warning. The counters of batches
      (`num_batches_tracked`) and the last layer's bias are not used.

  Returns:
    The parameters for `networks.inception.features`: nested dicts of float32 numpy arrays.

  Raises:
    ValueError: naming the file, its size and SHA-256, and the published ones, if it is missing, damaged or not a state
      dict of this network; naming the entry if one is missing, unknown, of another shape or not finite.
  """
  if isinstance(source, Mapping):
    return _convert(source)
  path = os.path.expanduser(source)
  if not os.path.isfile(path):
    raise ValueError(f"{path}: no such file: fetch {SOURCE} ({PUBLISHED_BYTES:,} bytes), and give its path")
  with open(path, "rb") as file:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
  try:
    contents = torch_pickle.read(path)
    if not isinstance(contents, Mapping):
      raise ValueError(f"holds a {type(contents).__name__}, not a state dict")
    params = _convert(contents)
  except ValueError as error:
    problem = str(error) if str(error).startswith(path) else f"{path}: {error}"
    raise ValueError(
      f"{problem}. The file has {os.path.getsize(path):,} bytes and SHA-256 {sha256}; "
      f"the published one, {SOURCE}, has {PUBLISHED_BYTES:,} and {PUBLISHED_SHA256}"
    ) from error
  if sha256 != PUBLISHED_SHA256:
    log.warning(
      "%s: Inception's names and shapes, but SHA-256 %s, not the %s of the published %s: features and metrics are "
      "comparable with others' only if the numbers in it are the same",
      path, sha256, PUBLISHED_SHA256, PUBLISHED,
    )  # fmt: skip
  return params


def _convert(state: Mapping[str, Any]) -> dict[str, Any]:
  """{published name: array or tensor of a file} → parameters; all names and shapes are checked before reading."""
  flat = flax.traverse_util.flatten_dict(inception.parameter_shapes(), sep="/")
  kernels = {path.removesuffix("/kernel"): leaf.shape for path, leaf in flat.items() if path.endswith("/kernel")}
  expected = _expected(kernels)
  saved = {name for name in state if not str(name).endswith(".num_batches_tracked")}
  missing, unknown = (sorted(map(str, names)) for names in (expected.keys() - saved, saved - expected.keys()))
  if missing or unknown:
    counts = f"{len(missing)} names are missing, {len(unknown)} are unknown"
    raise ValueError(
      f"not the FID's Inception: {counts}; missing: {missing[:3] or 'none'}; unknown: {unknown[:3] or 'none'}"
    )
  for name, shape in expected.items():
    if getattr(state[name], "shape", None) != shape:
      raise ValueError(f"{name} has shape {getattr(state[name], 'shape', None)}, but the FID's Inception has {shape}")

  params = {}
  for module in kernels:
    path, name = tuple(module.split("/")), module.replace("/", ".")
    if module == "fc":
      _read(state, "fc.bias")  # unused, but its damage shows a damaged file
      params[*path, "kernel"] = np.ascontiguousarray(_read(state, "fc.weight").T, np.float32)
    else:
      norm = (_read(state, f"{name}.bn.{part}") for part in NORM)
      params[*path, "kernel"], params[*path, "bias"] = fold(_read(state, f"{name}.conv.weight"), *norm)
  return flax.traverse_util.unflatten_dict(params)


def fold(weight: np.ndarray, scale: np.ndarray, shift: np.ndarray, mean: np.ndarray, variance: np.ndarray):
  """A convolution without bias and the batch norm after it → the kernel and bias of one convolution.

  (w∗x − mean)·scale/√(variance + ε) + shift = kernel∗x + bias.

  Args:
    weight: [out, in, height, width], as PyTorch has it.
    scale, shift, mean, variance: [out], of the batch norm.

  Returns:
    kernel [height, width, in, out] and bias [out], float32, computed in float64.
  """
  weight, scale, shift, mean, variance = (np.asarray(a, np.float64) for a in (weight, scale, shift, mean, variance))
  factor = scale / np.sqrt(variance + EPSILON)
  kernel = weight.transpose(2, 3, 1, 0) * factor
  return np.ascontiguousarray(kernel, np.float32), np.asarray(shift - mean * factor, np.float32)


def _expected(kernels: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  """{published name: shape}, by {module: shape of its kernel}."""
  expected = {"fc.bias": (inception.CLASSES,)}
  for module, shape in kernels.items():
    name = module.replace("/", ".")
    if module == "fc":
      expected["fc.weight"] = shape[::-1]
    else:
      height, width, channels, out = shape
      expected[f"{name}.conv.weight"] = (out, channels, height, width)
      expected |= {f"{name}.bn.{part}": (out,) for part in NORM}
  return expected


def _read(state: Mapping[str, Any], name: str) -> np.ndarray:
  """One array, checked to be finite, and not negative if it is a variance."""
  value = state[name]
  array = np.asarray(value.numpy() if isinstance(value, torch_pickle.Tensor) else value)
  bad = ~np.isfinite(array)
  if bad.any():
    raise ValueError(f"{name}: {bad.sum():,} of {bad.size:,} values are not finite")
  if name.endswith("running_var") and (array < 0).any():
    raise ValueError(f"{name}: a variance is {array.min():g}, below 0")
  return array
