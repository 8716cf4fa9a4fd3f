"""Inpainting and class-guided editing: a descent under a mask."""

import os
from typing import Any

import ml_collections
import numpy as np

from eqm_jax import devices
from eqm_jax.data.samples import Source
from eqm_jax.equilibrium import field, tasks
from eqm_jax.evaluation import evaluate, real, samplers
from eqm_jax.files import write_json
from eqm_jax.networks.dit import DiT
from eqm_jax.tasks import inputs

MASKS = ("left", "right", "top", "bottom", "centre", "all")
SHOWN = 12  # images in the picture


def inpaint(
  config: ml_collections.ConfigDict,
  model: DiT,
  params: Any,
  given: inputs.Inputs,
  source: Source,
  batching: samplers.Batching,
  directory: str,
) -> dict[str, Any]:
  """Paints the images anew under `config.tasks.inpaint.mask`.

  Writes inpaint.json, with the mean squared error under the mask beside that of filling
  in the mean of the data set, the results as inpainted.npz, and a picture: the images, what was
  left of them, and what came of it.

  Raises:
    ValueError: for a mask that is not known or does not fit, or a γ outside [0, 1].
  """
  options = config.tasks.inpaint
  row = inputs.check(config, model, batching)
  mask = read_mask(options.mask, model.input_shape)
  schedule = evaluate.schedule_of(config)
  field_fn = field.conditional_field(model, devices.replicate(params), **samplers.guidance_of(row))

  def part(index_B):
    image, label, index = batching.place((given.image_N[index_B], given.label_N[index_B], index_B))
    bound = field.BoundField(field_fn, label)
    return tasks.inpaint(
      bound,
      image,
      mask,
      schedule=schedule,
      gamma=options.gamma,
      settle=options.settle,
      tries=options.tries,
      index_B=index,
      **samplers.descent_of(row, batching),
    )

  result = samplers.in_batches("inpaint", part, len(given.image_N), batching)
  painted = np.broadcast_to(mask, result.x.shape) > 0
  mean_N = np.broadcast_to(inputs.first_images(source, real.MANY).mean(axis=0), result.x.shape)
  report = {
    "sampler": row.to_dict(),
    "images": len(result.x),
    "mask": options.mask,
    "gamma": options.gamma,
    "painted_share": float(painted.mean()),
    "mean_square_under_mask": inputs.mean_square(result.x[painted], given.image_N[painted]),
    "mean_square_of_mean_image": inputs.mean_square(mean_N[painted], given.image_N[painted]),
    "settle": options.settle,
    "tries": options.tries,
    "norm": float(result.norm_B.mean()),
    "evaluations": float(result.evaluations_B.mean()),
  }
  os.makedirs(directory, exist_ok=True)
  np.savez(
    os.path.join(directory, "inpainted.npz"),
    x=result.x,
    label=given.label_N,
    mask=mask,
    autoencoder=batching.autoencoder,
  )
  left_over = np.where(painted, 0.0, given.image_N)
  inputs.show([given.image_N, left_over, result.x], SHOWN, batching).save(os.path.join(directory, "inpaint.png"))
  write_json(os.path.join(directory, "inpaint.json"), report)
  return report


def read_mask(text: str, shape: tuple[int, int, int]) -> np.ndarray:
  """A mask [H, W, 1] of 0 and 1 (paint anew), by its name or from a .npy file [H, W].

  Raises:
    ValueError: for an unknown name, a missing file, or another shape or range.
  """
  H, W, _ = shape
  mask = np.zeros((H, W), np.float32)
  if text == "left":
    mask[:, : W // 2] = 1
  elif text == "right":
    mask[:, W // 2 :] = 1
  elif text == "top":
    mask[: H // 2] = 1
  elif text == "bottom":
    mask[H // 2 :] = 1
  elif text == "centre":
    mask[H // 4 : H - H // 4, W // 4 : W - W // 4] = 1
  elif text == "all":
    mask[:] = 1
  elif not text.endswith(".npy"):
    raise ValueError(f"tasks.inpaint.mask = {text!r} is not known: give {', '.join(MASKS)}, or a .npy [{H}, {W}]")
  else:
    try:
      mask = np.load(text)
    except (OSError, ValueError, EOFError) as error:
      raise ValueError(f"tasks.inpaint.mask: {text}: not a whole .npy file ({error})") from error
    if not isinstance(mask, np.ndarray):
      raise ValueError(f"tasks.inpaint.mask: {text} holds several arrays: give a .npy of one")
    if mask.shape != (H, W):
      raise ValueError(f"tasks.inpaint.mask: {text} has shape {mask.shape}, but the images are {(H, W)}")
  tasks.checked_mask(mask[..., None], (1, *shape))
  if not mask.any():
    raise ValueError(f"tasks.inpaint.mask = {text!r} has no pixel to paint on images of {H}×{W}")
  return mask[..., None].astype(np.float32)
