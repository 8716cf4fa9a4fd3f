"""Mode benchmark: speed and memory of a config on the devices of this process."""

import logging
import os

import ml_collections

from eqm_jax.benchmark import suite
from eqm_jax.checkpoints import manager
from eqm_jax.data import codec as codec_lib
from eqm_jax.modes import Mode, common

log = logging.getLogger(__name__)


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  checkpoint: str | None = None,
  compare: str | None = None,
  compare_any: bool = False,
):
  """Measures a config; where the workdir or `checkpoint` holds a model, with its stopping times.

  Args:
    config: the whole config.
    workdir: the results go to benchmark/ below it.
    checkpoint: model to use instead of the workdir's.
    compare: an earlier benchmark.json to compare with.
    compare_any: also compare where that is of another config or machine.

  Raises:
    ValueError: before anything is measured, if an option is out of range, the model does not fit the memory, or
      `compare` is not comparable.
  """
  if compare_any and not compare:
    raise ValueError("--compare_any needs --compare: give the file to compare with, --compare=benchmark.json")
  directory = os.path.join(workdir, "benchmark")
  has_model = checkpoint or manager.steps(workdir)
  trained = common.load_model(config, workdir, checkpoint, config.evaluation.weights) if has_model else None
  path = config.autoencoder.path
  codec = codec_lib.open_codec(config.autoencoder) if path and os.path.exists(path) else None
  suite.benchmark(config, directory, codec=codec, trained=trained, compare=compare, compare_any=compare_any)
  log.info("results: %s", directory)


MODE = Mode(
  name="benchmark",
  summary="Measures speed and memory of training, sampling, reading and metrics.",
  writes="benchmark/: benchmark.json, benchmark.md, sweep_*.png",
  run=run,
  checkpoint="takes",
  processes="one",
  flags=("compare", "compare_any"),
)
