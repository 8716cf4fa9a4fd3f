"""Mode denoise: images descend from where they are; the field is not conditioned on how noisy they are."""

import logging

import ml_collections
import numpy as np

from eqm_jax.equilibrium import tasks
from eqm_jax.modes import Mode
from eqm_jax.modes.task import COLUMNS, mean_square, open_task
from eqm_jax.sampling import applications

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None = None):
  """Denoises the images of `config.tasks` from each γ of `config.tasks.denoise.gammas`; None: as they are.

  Writes denoise.json with the NFE and the mean squared error before and after, the results as denoised.npz, and a
  picture: the images, and for each γ start and result.

  Raises:
    ValueError: for a γ outside [0, 1], and if the config does not fit the model or the data.
  """
  task = open_task("denoise", config, workdir, checkpoint)
  row, generator, gammas = task.row(), task.generator, config.tasks.denoise.gammas
  if gammas is not None and not gammas:
    raise ValueError("tasks.denoise.gammas = () must name at least one γ, or be None for images that are noisy already")
  image_N, label_N = task.inputs(noisy=gammas is None)
  if gammas is None:
    starts = {"unknown": image_N}
  else:
    starts = {f"{gamma:g}": np.asarray(tasks.noised(image_N, gamma, generator.key)) for gamma in gammas}
  pictured, arrays = [image_N], {}
  report = {"sampler": row.to_dict(), "images": len(image_N), "rows": {}}
  for name, start_N in starts.items():
    result = applications.descend_images(f"γ = {name}", generator, row, start_N, label_N)
    report["rows"][name] = {"nfe": float(result.nfe.mean()), "norm": float(result.norm.mean())}
    if gammas is not None:
      report["rows"][name]["mean_square_before"] = mean_square(start_N, image_N)
      report["rows"][name]["mean_square_after"] = mean_square(result.x, image_N)
      pictured.append(start_N)
    pictured.append(result.x)
    arrays[f"gamma_{name}"] = result.x
  task.write(report, task.picture(pictured, generator.captions(label_N[:COLUMNS])), "denoised.npz", arrays)
  log.info("denoised images: %s", task.directory)


MODE = Mode(
  name="denoise",
  summary="Removes noise from images, of known or unknown strength.",
  writes="denoise/: denoise.png, denoised.npz, denoise.json (errors, NFE)",
  run=run,
  checkpoint="needs",
  processes="one",
)
