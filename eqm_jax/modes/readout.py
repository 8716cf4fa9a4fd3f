"""Mode readout: how well a field without time knows the noise level of its input, and a read-out to stop by."""

import logging
import os

import ml_collections
import numpy as np

from eqm_jax import plotting
from eqm_jax.checkpoints import readouts
from eqm_jax.checks import at_least, in_interval
from eqm_jax.equilibrium import noise_level
from eqm_jax.evaluation import readout
from eqm_jax.modes import Mode
from eqm_jax.modes.task import Task, open_task

LEAST = 60  # noised samples

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None = None):
  """Fits a linear read-out of γ to the tokens of the frozen network, and scores it on images that it was not fitted to.

  These are one in six of the data set, which the network may have been trained on, or the images of `tasks.images`.

  Writes readout.npz, for samplers with stop = 'gamma'; readout.json with RMSE and bias by γ, and those of read-outs of
  the untrained network and of the pixels; a picture of these; and predictions.npz with γ and γ̂ of each sample.

  Raises:
    ValueError: before anything is computed, for a model that takes γ as an input or is an energy, an option out of
      range, or too few images.
  """
  options = config.tasks.readout
  at_least("tasks.readout.num_samples", options.num_samples, LEAST, "a fit needs some at every noise level")
  in_interval("tasks.readout.ridge", options.ridge, 0, np.inf, open_low=True, open_high=True)
  task = open_task("readout", config, workdir, checkpoint)
  generator = task.generator
  noise_level.check_model(generator.model)
  study = readout.study(generator, *_images(task), options.num_samples, options.ridge)
  report = {"weights": generator.params_sha256, "held_out": config.tasks.images or "one in six of data.source"}
  report |= {**options.to_dict(), **study.report()}
  arrays = {"gamma": study.gamma, **{name.replace(" ", "_"): values for name, values in study.predicted.items()}}
  task.write(report, plotting.level_errors(study.gamma, study.predicted, readout.BINS), "predictions.npz", arrays)
  path = os.path.join(task.directory, "readout.npz")
  readouts.save(path, study.readout, generator.params)
  errors = "  ".join(f"{name} {report[name]['rmse']:.3f}" for name in study.predicted)
  log.info("RMSE of γ: %s; %s", errors, path)


def _images(task: Task) -> tuple[readout.Data, readout.Data]:
  """The images and labels that the read-out is fitted to, and held-out ones.

  Raises:
    ValueError: if there are too few.
  """
  image_N, label_N = task.real_and_labels(task.options.readout.num_samples)
  if task.options.images is not None:
    return (image_N, label_N), task.inputs()
  if len(image_N) < readout.HELD_OUT:
    raise ValueError(
      f"data.source = {task.config.data.source!r} has {len(image_N)} images, and one in {readout.HELD_OUT} is held "
      "out: give more, or held-out ones as tasks.images"
    )
  is_held_N = np.arange(len(image_N)) % readout.HELD_OUT == readout.HELD_OUT - 1
  return (image_N[~is_held_N], label_N[~is_held_N]), (image_N[is_held_N], label_N[is_held_N])


MODE = Mode(
  name="readout",
  summary="Reads the noise level off a frozen field, to score it and to stop samples by it.",
  writes="readout/: readout.npz, readout.json (RMSE and bias by γ), readout.png, predictions.npz",
  run=run,
  checkpoint="needs",
  processes="one",
)
