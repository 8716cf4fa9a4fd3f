"""Partial denoising: images descend from where they are, however noisy, and nobody tells the field how noisy."""

import os
from typing import Any

import ml_collections
import numpy as np

from eqm_jax import devices
from eqm_jax.equilibrium import field, sampler, tasks
from eqm_jax.evaluation import samplers
from eqm_jax.files import write_json
from eqm_jax.networks.dit import DiT
from eqm_jax.tasks import inputs

SHOWN = 12  # images in the picture


def denoise(
  config: ml_collections.ConfigDict,
  model: DiT,
  params: Any,
  given: inputs.Inputs,
  batching: samplers.Batching,
  directory: str,
) -> dict[str, Any]:
  """Denoises the images from each γ of `config.tasks.denoise.gammas`.

  Writes denoise.json, with the error before and after and the evaluations used, the
  results as denoised.npz, and a picture: the images, and for each γ what was given and
  what came of it.

  Raises:
    ValueError: for a γ outside [0, 1].
  """
  row = inputs.check(config, model, batching)
  field_fn = field.conditional_field(model, devices.replicate(params), **samplers.guidance_of(row))
  gammas = tuple(config.tasks.denoise.gammas)
  if gammas:
    starts = {f"{gamma:g}": noised(given.image_N, gamma, batching) for gamma in gammas}
  else:
    starts = {"unknown": given.image_N}
  strips, report, arrays = [given.image_N], {"sampler": row.to_dict(), "images": len(given.image_N), "rows": {}}, {}
  for name, start_N in starts.items():
    result = descend(row, field_fn, start_N, given.label_N, batching, name=f"γ = {name}")
    report["rows"][name] = {"evaluations": float(result.evaluations_B.mean()), "norm": float(result.norm_B.mean())}
    if gammas:
      report["rows"][name]["mean_square_before"] = inputs.mean_square(start_N, given.image_N)
      report["rows"][name]["mean_square_after"] = inputs.mean_square(result.x, given.image_N)
      strips.append(start_N)
    strips.append(result.x)
    arrays[f"gamma_{name}"] = result.x
  os.makedirs(directory, exist_ok=True)
  np.savez(os.path.join(directory, "denoised.npz"), **arrays, autoencoder=batching.autoencoder)
  inputs.show(strips, SHOWN, batching).save(os.path.join(directory, "denoise.png"))
  write_json(os.path.join(directory, "denoise.json"), report)
  return report


def noised(image_N: np.ndarray, gamma: float, batching: samplers.Batching) -> np.ndarray:
  """The images at γ, the noise of image i depending on (key, i) alone."""
  return np.asarray(tasks.noised(image_N, gamma, batching.key))


def descend(
  row: ml_collections.ConfigDict,
  field_fn: field.ConditionalField,
  start_N: np.ndarray,
  label_N: np.ndarray,
  batching: samplers.Batching,
  name: str = "descend",
) -> sampler.Result:
  """Descends from given starts [N, H, W, C] with a row of the samplers, batch by batch."""

  def part(index_B):
    start, label = batching.place((start_N[index_B], label_N[index_B]))
    bound = field.BoundField(field_fn, label)
    return samplers.descend_row(row, bound, start, batching, index_B=batching.place(index_B))

  return samplers.in_batches(name, part, len(start_N), batching)
