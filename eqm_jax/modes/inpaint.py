"""Mode inpaint: inpainting and class-guided editing, by a descent under a mask."""

import logging
from typing import Any

import ml_collections
import numpy as np

from eqm_jax.data import arrays
from eqm_jax.equilibrium import objective, tasks
from eqm_jax.equilibrium.sampler import Result
from eqm_jax.evaluation.reference_data import MAX_FEATURES
from eqm_jax.modes import Mode
from eqm_jax.modes.task import COLUMNS, Task, mean_square, open_task

MASKS = ("left", "right", "top", "bottom", "centre", "all")

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None = None):
  """Paints the images of `config.tasks` anew under `config.tasks.inpaint.mask`.

  Writes inpaint.json, with the mean squared error under the mask beside that of the mean of the data set, the results
  as inpainted.npz, and a picture: the images, what the mask leaves of them, and the results.

  Raises:
    ValueError: for an unknown mask, one that does not fit, a γ outside [0, 1], and if the config does not fit the model
      or the data.
  """
  task = open_task("inpaint", config, workdir, checkpoint)
  image_N, label_N = task.inputs()
  row = task.row(stops=("norm",))
  mask = read_mask(config.tasks.inpaint.mask, task.generator.model.input_shape)
  result = _descend(task, row, image_N, label_N, mask)
  painted = np.broadcast_to(mask, result.x.shape) > 0
  report = {"sampler": row.to_dict(), "images": len(result.x), **config.tasks.inpaint.to_dict()}
  report |= _errors(task, result, image_N, painted)
  left_over = np.where(painted, 0.0, image_N)
  saved = {"x": result.x, "label": label_N, "mask": mask}
  picture = task.picture([image_N, left_over, result.x], task.generator.captions(label_N[:COLUMNS]))
  task.write(report, picture, "inpainted.npz", saved)
  log.info("inpainted images: %s", task.directory)


def _descend(
  task: Task, row: ml_collections.ConfigDict, image_N: np.ndarray, label_N: np.ndarray, mask: np.ndarray
) -> Result:
  generator, options = task.generator, task.options.inpaint
  settings = {"gamma": options.gamma, "settle": options.settle, "tries": options.tries}
  settings |= {"schedule": objective.schedule_of(task.config.objective), **generator.descent_options(row)}
  field = generator.field(row)

  def paint(index):
    image, label, index = generator.shard((image_N[index], label_N[index], index))
    return tasks.inpaint(field.bind(label), image, mask, index=index, **settings)

  return generator.in_batches("inpaint", paint, len(image_N))


def _errors(task: Task, result: Result, image_N: np.ndarray, painted: np.ndarray) -> dict[str, Any]:
  mean_N = np.broadcast_to(task.real(MAX_FEATURES).mean(axis=0), result.x.shape)
  return {
    "painted_fraction": float(painted.mean()),
    "mean_square_under_mask": mean_square(result.x[painted], image_N[painted]),
    "mean_square_of_mean_image": mean_square(mean_N[painted], image_N[painted]),
    "norm": float(result.norm.mean()),
    "nfe": float(result.nfe.mean()),
  }


def read_mask(spec: str, shape: tuple[int, int, int]) -> np.ndarray:
  """A mask [H, W, 1] of 0 and 1 (paint anew), by its name or from a .npy file [H, W].

  Raises:
    ValueError: for an unknown name, a missing file, or another shape or range.
  """
  H, W, _ = shape
  if spec in MASKS:
    mask = _named_mask(spec, H, W)
  elif spec.endswith((".npy", ".npz")):
    try:
      mask = _stored_mask(spec, H, W)
    except ValueError as error:
      raise ValueError(f"tasks.inpaint.mask: {error}") from error
  else:
    raise ValueError(f"tasks.inpaint.mask = {spec!r} is unknown: give {', '.join(MASKS)}, or a .npy [{H}, {W}]")
  if not mask.any():
    raise ValueError(
      f"tasks.inpaint.mask = {spec!r} has no pixel to paint on images of {H}×{W}: give one with at least one pixel"
    )
  return mask[..., None].astype(np.float32)


def _named_mask(name: str, H: int, W: int) -> np.ndarray:
  regions = {
    "left": np.s_[:, : W // 2],
    "right": np.s_[:, W // 2 :],
    "top": np.s_[: H // 2],
    "bottom": np.s_[H // 2 :],
    "centre": np.s_[H // 4 : H - H // 4, W // 4 : W - W // 4],
    "all": np.s_[:],
  }
  mask = np.zeros((H, W), np.float32)
  mask[regions[name]] = 1
  return mask


def _stored_mask(path: str, H: int, W: int) -> np.ndarray:
  headers = arrays.read_headers(path)
  if len(headers) > 1:
    raise ValueError(f"{path} holds several arrays, {', '.join(headers)}: give a .npy of one")
  mask = arrays.load(path, [*headers])[next(iter(headers))]
  if mask.shape in ((H, W, 1), (1, H, W), (1, H, W, 1)):
    mask = mask.reshape(H, W)
  if mask.shape != (H, W):
    raise ValueError(
      f"{path} has shape {mask.shape}, but the images are {(H, W)}: give a mask of their shape, one for all images"
    )
  if mask.dtype.kind not in "biuf" or not np.all((mask == 0) | (mask == 1)):
    values = ", ".join(map(str, np.unique(mask)[:4].tolist()))
    raise ValueError(f"{path} has values such as {values}: give 1 (paint anew) and 0 (keep), mask > 127 of an image")
  return mask


MODE = Mode(
  name="inpaint",
  summary="Paints a part of images anew, or edits them towards a class.",
  writes="inpaint/: inpaint.png, inpainted.npz, inpaint.json (errors, NFE)",
  run=run,
  checkpoint="needs",
  processes="one",
)
