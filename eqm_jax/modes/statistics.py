"""Mode statistics: statistics of the real images, for evaluations that read them from a file."""

import logging
import os

import ml_collections

from eqm_jax import distributed
from eqm_jax.evaluation import features, reference_data
from eqm_jax.modes import Mode, common

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str):
  """Computes the Inception statistics of the config's images into `evaluation.inception.reference`.

  Raises:
    ValueError: if 'inception' is not among the features, the file is not named or exists, or the data does not fit.
  """
  del workdir
  options, path = config.evaluation, config.evaluation.inception.reference
  if "inception" not in options.features or path is None or os.path.exists(path):
    raise ValueError(
      f"evaluation.features = {tuple(options.features)} must name 'inception', and evaluation.inception.reference = "
      f"{path!r} a file that does not exist yet: the statistics are written to it"
    )
  features.check(options)
  images = common.open_images(config)
  space = features.open_features("inception", options, None, False)
  statistics = reference_data.compute_statistics(images, space, True, config.data.threads)
  if distributed.process_index_and_count()[0] == 0:
    reference_data.save(path, statistics)
  log.info("statistics of %d images: %s", len(images), path)


MODE = Mode(
  name="statistics",
  summary="Computes statistics of the real images, once for many evaluations.",
  writes="the file of --config.evaluation.inception.reference",
  run=run,
  checkpoint="none",
  processes="many",
  checkpoint_hint="statistics are of the data set, not of a model",
)
