"""Mode statistics: statistics of the real images, for evaluations that read them from a file."""

import logging
import os

import ml_collections

from eqm_jax import distributed
from eqm_jax.evaluation import features, reference_data
from eqm_jax.modes import Mode, common

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str):
  """Computes the statistics of the config's images into the files `evaluation.NAME.reference` that do not exist.

  NAME is each of the published networks among the features.

  Raises:
    ValueError: if no such file is named, or the data does not fit.
  """
  del workdir
  options = config.evaluation
  missing = {name: path for name, path in features.references(options).items() if not os.path.exists(path)}
  if not missing:
    raise ValueError(
      f"evaluation.features = {tuple(options.features)} must name one of {', '.join(features.PUBLISHED)}, and "
      f"evaluation.NAME.reference (here {features.references(options) or None}) a file that does not exist yet: its "
      "statistics are written to it"
    )
  if len({os.path.realpath(path) for path in missing.values()}) < len(missing):
    keys = " and ".join(f"evaluation.{name}.reference" for name in missing)
    raise ValueError(f"{keys} are one file, {next(iter(missing.values()))!r}: give each network's statistics their own")
  features.check(options, networks=missing)
  images = common.open_images(config)
  for name, path in missing.items():
    space = features.open_features(name, options, None, False)
    statistics = reference_data.compute_statistics(images, space, True, config.data.threads)
    if distributed.process_index_and_count()[0] == 0:
      reference_data.save(path, statistics)
    log.info("statistics of %d images in the features of %s: %s", len(images), name, path)


MODE = Mode(
  name="statistics",
  summary="Computes statistics of the real images, once for many evaluations.",
  writes="the files of --config.evaluation.inception.reference and .dinov2.reference that do not exist yet",
  run=run,
  checkpoint="none",
  processes="many",
  checkpoint_hint="statistics are of the data set, not of a model",
)
