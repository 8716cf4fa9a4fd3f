"""Pictures of a few descents: a strip of frames, an animation, and the ‖f‖ curves."""

import os

import jax
import numpy as np

from eqm_jax import plotting
from eqm_jax.sampling.generator import Generator, Row, stops_by_gamma

FRAMES = 25  # of the animation
COLUMNS = 9  # of the strip


def plot(generator: Generator, row: Row, labels: np.ndarray, directory: str):
  """Writes descent.png, descent.gif and norms.png into `directory`.

  The frames are equally spaced up to the NFE at which the last of the samples stops.

  Args:
    generator: the model to sample from.
    row: a row of the config's samplers that descends.
    labels: a few labels; sample i is the i-th of the generator's samples.
    directory: must exist.
  """
  start, field = generator.noise(np.arange(len(labels))), generator.field(row).bind(labels)
  norms = generator.descend(row, start, field, record_at=range(row.max_nfe + 1), record_fn=_norm)
  last = int(norms.nfe.max())
  steps = np.unique(np.linspace(0, last, FRAMES).round().astype(int))
  frames = np.asarray(generator.descend(row, start, field, record_at=steps, record_fn=_x).record)

  pixels = generator.pixels(frames.reshape(-1, *generator.model.input_shape))
  frames = pixels.reshape(*frames.shape[:2], *pixels.shape[1:])
  captions = generator.captions(labels)
  animation = [plotting.grid(frame, len(frame), captions=captions) for frame in frames]
  plotting.animation(animation, os.path.join(directory, "descent.gif"))
  columns = frames[np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)]
  strip = columns.swapaxes(0, 1).reshape(-1, *pixels.shape[1:])
  captions = plotting.row_captions(captions, len(columns)) if captions else None
  plotting.grid(strip, len(columns), captions=captions).save(os.path.join(directory, "descent.png"))
  curves = np.asarray(norms.record)[1 : last + 1]
  threshold = None if stops_by_gamma(row) else row.threshold
  plotting.norm_curves(curves, np.asarray(norms.nfe), threshold).save(os.path.join(directory, "norms.png"))


def _x(x: jax.Array, norm_B: jax.Array) -> jax.Array:
  return x


def _norm(x: jax.Array, norm_B: jax.Array) -> jax.Array:
  return norm_B
