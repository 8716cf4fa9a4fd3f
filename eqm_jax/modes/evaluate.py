"""Mode evaluate: samples of a model compared with real data."""

import contextlib
import logging
import os

import ml_collections
from PIL import Image

from eqm_jax.checkpoints.pretrained import Pretrained
from eqm_jax.data.codec import check_same_autoencoder
from eqm_jax.evaluation import evaluator, features, validation
from eqm_jax.evaluation.reference_data import ReferenceData
from eqm_jax.modes import Mode, common
from eqm_jax.sampling.generator import Generator
from eqm_jax.training import run_page, wandb_run

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None = None):
  """Evaluates a model as `config.evaluation` says, and writes evaluation/ in the workdir.

  Raises:
    ValueError: before sampling, if the config, the model and the data do not fit; after it, if the samples are not
      finite or all the same.
  """
  features.check(config.evaluation)
  generator, model = common.open_generator(config, config.evaluation, workdir, checkpoint)
  reference = open_reference(config, generator, model.autoencoder)
  write_evaluation(config, workdir, generator, reference, origin_of(model, checkpoint))


def open_reference(
  config: ml_collections.ConfigDict, generator: Generator, autoencoder_id: dict[str, str] | None = None
) -> ReferenceData:
  """The real data that samples are compared with.

  Args:
    config: the whole config.
    generator: the model to evaluate, with or without parameters.
    autoencoder_id: of the model's latents, where they are known.

  Raises:
    ValueError: before anything is read, if the evaluation's settings do not fit; then, if the data does not.
  """
  validation.check_options(config, generator)
  needs_samples, needs_images = validation.needs(config)
  source = common.open_source(config) if needs_samples else None
  images = common.open_images(config) if needs_images else None
  check_same_autoencoder("the model", autoencoder_id, source.autoencoder_id if source else None)
  validation.check_data(config, generator, source, images)
  return ReferenceData(config.evaluation, source, images, config.data.threads)


def write_evaluation(
  config: ml_collections.ConfigDict, workdir: str, generator: Generator, reference: ReferenceData, origin: dict
):
  """Evaluates the generator into the workdir; `origin` says where its weights are from."""
  directory = os.path.join(workdir, "evaluation")
  generator = common.with_class_names(generator, reference.class_names)
  report = evaluator.evaluate(config, generator, reference, directory, origin)
  if report is not None:
    run_page.write(workdir)
    _log_to_wandb(config, workdir, report)
  log.info("evaluation: %s", directory)


def _log_to_wandb(config: ml_collections.ConfigDict, workdir: str, report: dict):
  """Adds the metrics and pictures to the run of the workdir, if the config has one."""
  step = report["weights"]["step"] or 0
  with contextlib.closing(wandb_run.WandbRun(config, workdir)) as run:
    for name, row in report["rows"].items():
      run.log(step, {f"{name}/{metric}": value for metric, value in evaluator.flat(row["metrics"]).items()})
      with Image.open(os.path.join(workdir, "evaluation", f"samples_{name}.png")) as picture:
        run.log_picture(step, f"{name}/samples", picture)


def origin_of(model: Pretrained, checkpoint: str | None) -> dict:
  """Where the weights of a model are from, for the report."""
  return {"checkpoint": checkpoint or "of the workdir", "step": model.step}


MODE = Mode(
  name="evaluate",
  summary="Compares samples of a model with real data: FID and other metrics, NFE, speed.",
  writes="evaluation/: evaluation.json, evaluation.md, pictures, pages of samples; report.html",
  run=run,
  checkpoint="needs",
  processes="many",
)
