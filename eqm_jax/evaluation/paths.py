"""The ways of a few samples down the landscape, drawn: a strip, an animation, and the ‖f‖ curves."""

import os
from typing import Any

import jax
import ml_collections
import numpy as np

from eqm_jax.equilibrium import field, sampler
from eqm_jax.evaluation import pictures, samplers
from eqm_jax.networks.dit import DiT

FRAMES, COLUMNS = 25, 9  # of the animation; of the strip, every third of them


def draw(
  row: ml_collections.ConfigDict,
  model: DiT,
  params: Any,
  label_B: np.ndarray,
  batching: samplers.Batching,
  directory: str,
):
  """Writes descent.png, descent.gif and norms.png into `directory`.

  The frames are equally spaced up to where the last of the samples stops.

  Args:
    row: a row of the config's samplers, one that descends.
    model, params: what is sampled.
    label_B: a few labels; sample i is the i-th of the series that `batching.key` gives.
    batching: of which the key and λ are used.
    directory: where the pictures go.
  """
  noise = sampler.start_noise(batching.key, np.arange(len(label_B)), model.input_shape)
  bound = field.bound(field.conditional_field(model, params, **samplers.guidance_of(row)), label_B)
  norms = samplers.descend_row(row, bound, noise, batching, record_at=range(row.max_evaluations + 1), record_fn=_norm)
  last = int(norms.evaluations_B.max())
  steps = np.unique(np.linspace(0, last, FRAMES).round().astype(int))
  frames = np.asarray(samplers.descend_row(row, bound, noise, batching, record_at=steps, record_fn=_x).record)

  pixels = batching.pixels(frames.reshape(-1, *model.input_shape))
  frames = pixels.reshape(*frames.shape[:2], *pixels.shape[1:])
  animation = [pictures.grid(frame, len(frame)) for frame in frames]
  pictures.animation(animation, os.path.join(directory, "descent.gif"))
  columns = frames[np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)]
  strip = columns.swapaxes(0, 1).reshape(-1, *pixels.shape[1:])
  pictures.grid(strip, len(columns)).save(os.path.join(directory, "descent.png"))
  curves = np.asarray(norms.record)[1 : last + 1]
  pictures.norm_curves(curves, np.asarray(norms.evaluations_B), row.threshold).save(
    os.path.join(directory, "norms.png")
  )


def _x(x: jax.Array, norm_B: jax.Array) -> jax.Array:
  return x


def _norm(x: jax.Array, norm_B: jax.Array) -> jax.Array:
  return norm_B
