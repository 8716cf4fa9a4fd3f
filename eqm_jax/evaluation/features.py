"""What samples are compared in: their own numbers, a small classifier's features, or Inception's."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from eqm_jax import devices
from eqm_jax.convert import inception as convert
from eqm_jax.convert.fingerprint import fingerprint
from eqm_jax.evaluation import fitting
from eqm_jax.networks import inception
from eqm_jax.networks.classifier import Classifier

NAMES = ("raw", "classifier", "inception")
OF_IMAGES = ("classifier", "inception")


@dataclasses.dataclass(frozen=True)
class Features:
  """A way to compare samples."""

  name: str  # one of NAMES
  identity: dict[str, Any]  # all that a number depends on: distances are comparable if it is the same
  # Samples [N, H, W, C] float32 ("raw"), or images [N, H, W, C] uint8 → "pool" [N, D], and maybe "spatial" [N, S] and
  # "logits" [N, classes], all float32.
  extract: Callable[[np.ndarray], dict[str, np.ndarray]]
  sizes: dict[str, int]  # D and S, as far as they are known before


def check(options: ml_collections.ConfigDict):
  """Refuses features that are not known or not there; `options` is the section evaluation.

  Raises:
    ValueError: naming the key and the value.
  """
  named = tuple(options.features)
  if not named or any(name not in NAMES or named.count(name) > 1 for name in named):
    raise ValueError(f"evaluation.features = {named}: name some of {', '.join(NAMES)}, each once")
  if options.classifier.steps < 1:
    raise ValueError(f"evaluation.classifier.steps = {options.classifier.steps} must be at least 1")
  if "inception" not in options.features:
    return
  wanted = options.inception
  if wanted.resize not in inception.RESIZES:
    raise ValueError(f"evaluation.inception.resize = {wanted.resize!r} is not one of {', '.join(inception.RESIZES)}")
  if wanted.dtype != "float32":
    raise ValueError(
      f"evaluation.inception.dtype = {wanted.dtype!r}: reported numbers are computed in float32 only; "
      "bfloat16 moves an FID by more than methods differ"
    )
  if wanted.batch_size < 1:
    raise ValueError(f"evaluation.inception.batch_size = {wanted.batch_size} must be at least 1")
  if not os.path.isfile(wanted.path):
    raise ValueError(
      f"evaluation.inception.path = {wanted.path!r}: no such file. Fetch {convert.PUBLISHED} "
      "(docs/evaluation.md), or set evaluation.samples = 0"
    )


def open_features(
  name: str, options: ml_collections.ConfigDict, images: tuple[np.ndarray, np.ndarray, int] | None, in_pixels: bool
) -> Features:
  """The features `name`; `options` is the section evaluation, checked.

  Args:
    images: real images [N, H, W, C], their labels and the number of classes, which "classifier" is fitted to.
    in_pixels: of "raw", whether samples are pixels in [−1, 1], beyond which they are clipped.

  Raises:
    ValueError: if Inception's weights are not what they should be, or the data has no classes to tell apart.
  """
  if name == "raw":
    return Features(name, {"name": name}, functools.partial(_raw, in_pixels=in_pixels), {})
  if name == "inception":
    params = convert.load(options.inception.path)
    identity = {"name": "inception", "resize": options.inception.resize, "sha256": fingerprint(params)}
    placed = devices.replicate(params)

    def extract(images):
      found = inception.features(placed, images, options.inception.resize)
      return {
        "pool": found["pool"],
        "spatial": found["spatial"].reshape(len(images), -1),
        "logits": found["logits_unbiased"],
      }

    sizes = {"pool": 2048, "spatial": 17 * 17 * 7}
    return Features(name, identity, _batched(extract, options.inception.batch_size), sizes)
  module, params, accuracy = fitting.fit(*images, options.classifier.steps)
  # Two fits on GPUs differ in their bits: all processes take the first one's.
  params, accuracy = devices.from_first(params), float(devices.from_all(np.asarray(accuracy))[0])
  identity = {"name": name, "sha256": fingerprint(params), "held_out_accuracy": accuracy, "dtype": "float32"}
  apply = functools.partial(_classify, module, devices.replicate(params))
  return Features(name, identity, _batched(apply, fitting.BATCH), {})


def _raw(samples: np.ndarray, in_pixels: bool) -> dict[str, np.ndarray]:
  samples = samples.reshape(len(samples), -1)
  return {"pool": np.clip(samples, -1, 1) if in_pixels else samples}


def _batched(function: Callable, batch_size: int) -> Callable:
  return lambda images: devices.in_batches(function, images, batch_size)


@functools.partial(jax.jit, static_argnums=0)
def _classify(module: Classifier, params: Any, images: jax.Array) -> dict[str, jax.Array]:
  return module.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1)
