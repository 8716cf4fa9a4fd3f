"""Mode ood: out-of-distribution detection, by scores that separate the data from outliers."""

import logging
import os

import ml_collections
import numpy as np

from eqm_jax import plotting
from eqm_jax.evaluation import outliers
from eqm_jax.modes import Mode
from eqm_jax.modes.task import COLUMNS, open_task

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None = None):
  """Scores samples of the data set and outliers.

  In-distribution are `tasks.num_images` samples, evenly spaced over the data set: where the model was trained on them
  they look more familiar than new data would. Outliers are the kinds of `tasks.ood.against`, and the images of
  `tasks.images` if there are any.

  Writes ood.json (AUROC of every score against every kind: 1 is perfect, 0.5 is chance), scores.npz (the scores), and
  pictures of the images and of the scores.

  Raises:
    ValueError: before scoring, for an unknown score or kind, or an energy of a model that has none.
  """
  task = open_task("ood", config, workdir, checkpoint)
  options = config.tasks.ood
  data_N = task.real(config.tasks.num_images)
  kinds = {name: outliers.make(name, data_N, config.tasks.seed) for name in options.against}
  if config.tasks.images is not None:
    kinds["images"], _ = task.inputs()
  if not kinds or not options.scores:
    raise ValueError(
      f"tasks.ood.scores = {tuple(options.scores)} and tasks.ood.against = {tuple(options.against)}: "
      "name at least one of each, or give tasks.images to score against"
    )
  scores = {name: outliers.make_score(name, task.generator, task.source) for name in options.scores}
  report, arrays = {"images": len(data_N), "auroc": {}}, {}
  for name, score in scores.items():
    by_kind = {kind: score(image_N) for kind, image_N in {"data": data_N, **kinds}.items()}
    aurocs = {kind: outliers.auroc(by_kind["data"], by_kind[kind]) for kind in kinds}
    report["auroc"][name] = {**aurocs, "mean": float(np.mean(list(aurocs.values())))}
    arrays |= {f"{name}_{kind}": values for kind, values in by_kind.items()}
  pictured = [image_N[np.arange(max(COLUMNS, len(data_N))) % len(image_N)] for image_N in (data_N, *kinds.values())]
  task.write(report, task.picture(pictured), "scores.npz", arrays)
  for name, aurocs in report["auroc"].items():
    groups = {kind: arrays[f"{name}_{kind}"] for kind in ("data", *kinds)}
    plotting.box_plot(groups, name).save(os.path.join(task.directory, f"scores_{name}.png"))
    log.info("AUROC by %s: %s", name, "  ".join(f"{kind} {value:.3f}" for kind, value in aurocs.items()))
  log.info("out-of-distribution scores: %s", task.directory)


MODE = Mode(
  name="ood",
  summary="Detects out-of-distribution images by ‖f‖, energy, or Mahalanobis distance.",
  writes="ood/: ood.png, scores_*.png, scores.npz, ood.json (AUROC)",
  run=run,
  checkpoint="needs",
  processes="one",
)
