"""A run of Weights & Biases beside the files in the workdir. Where it fails, a warning says so; training goes on."""

import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from PIL import Image

from eqm_jax import distributed
from eqm_jax.io import read_json, write_json

FILE = "wandb.json"  # in the workdir: the run that a resumed training continues
# Seconds. Without a network a training starts this much later, and ends that much later.
INIT_TIMEOUT, FINISH_TIMEOUT = 30, 60

log = logging.getLogger(__name__)


def check(project: str | None):
  """Refuses a project where the package is missing.

  Raises:
    ValueError: with the command that installs it.
  """
  if project is None:
    return
  try:
    import wandb

    wandb.init  # noqa: B018  # a directory wandb/ beside the program passes for a package, an empty one
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f"train.wandb_project = {project!r} needs the package: pip install 'eqm_jax[wandb]', or set it to None"
    ) from error


class WandbRun:
  """The run of a workdir: the same one each time that the training resumes. Without a project it does nothing."""

  def __init__(self, config: ml_collections.ConfigDict, workdir: str):
    """Starts or continues the run, in the first process.

    Args:
      config: the whole config; `train.wandb_project` names the project.
      workdir: of the training.
    """
    self._run = None
    self._remedy = f"upload what it has kept by `wandb sync {os.path.join(workdir, 'wandb')}/*run-*`"
    if config.train.wandb_project is None or distributed.process_index_and_count()[0] != 0:
      return
    try:
      self._run = _init(config, workdir)
    except Exception as error:  # whatever it is, it does not concern the training
      self._warn(error)

  def log(self, step: int, metrics: Mapping[str, float]):
    """Logs the metrics of a step."""
    # Of its own step counter it drops what is not in order, such as an evaluation that ends some steps later.
    self._try(lambda run: run.log({"step": step, **metrics}))

  def log_picture(self, step: int, name: str, picture: Image.Image):
    """Logs a picture of a step."""

    def log_image(run):
      import wandb

      run.log({"step": step, name: wandb.Image(picture)})

    self._try(log_image)

  def close(self):
    """Ends the run: as failed, if an exception is on its way."""
    self._try(lambda run: run.finish(exit_code=int(sys.exc_info()[0] is not None)))
    self._run = None

  def _try(self, action: Callable[[Any], None]):
    if self._run is None:
      return
    try:
      action(self._run)
    except Exception as error:  # as above
      self._run = None
      self._warn(error)

  def _warn(self, error: Exception):
    text = "Weights & Biases: %s. Training goes on without it, and metrics.jsonl and tensorboard/ have all; %s"
    log.warning(text, _line(error), self._remedy)


def _init(config: ml_collections.ConfigDict, workdir: str) -> Any:
  """A run as the environment says (WANDB_MODE, WANDB_ENTITY, ...); an offline one where that fails."""
  import wandb

  project, path = config.train.wandb_project, os.path.join(workdir, FILE)
  run_id = read_json(path)["id"] if os.path.exists(path) else secrets.token_hex(4)
  write_json(path, {"id": run_id, "project": project})
  settings = {
    "project": project,
    "id": run_id,
    "resume": "allow",
    "dir": workdir,
    "name": os.environ.get("WANDB_NAME", os.path.basename(os.path.abspath(workdir))),
    "config": json.loads(config.to_json()),
    "reinit": "create_new",  # another run of this process, a notebook's say, is not ours to use or end
    "settings": wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT),
  }
  try:
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):  # nobody may be there to answer
      raise ValueError("no API key")
    run = wandb.init(**settings)
  except Exception as error:
    run = wandb.init(**settings, mode="offline")
    log.warning(
      "Weights & Biases: %s. This run is logged offline: upload it by `wandb sync %s`. To log online, `wandb login` or "
      "set WANDB_API_KEY, and see that the network is there",
      _line(error),
      os.path.join(workdir, "wandb", "offline-run-*"),
    )
  run.define_metric("*", step_metric="step")
  return run


def _line(error: Exception) -> str:
  """The text of an error in one line."""
  return " ".join(str(error).split()).rstrip(".") or type(error).__name__
