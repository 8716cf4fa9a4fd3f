"""Mode plan: memory and time of a config's programs on TPU slices, compiled without them."""

import logging
import os

import ml_collections

from eqm_jax.modes import Mode
from eqm_jax.plan import plan
from eqm_jax.plan import topology as topology_lib

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str, topology: str | None = None, search: bool = False):
  """Compiles the programs of a config for the slices of `topology`.

  Args:
    config: the whole config.
    workdir: the results go to plan/ below it.
    topology: slices with commas between them, such as "v5e:4x4,v4-32".
    search: look for cheaper settings even where those of the config fit.

  Raises:
    ValueError: before anything is compiled, if a slice is unknown, libtpu is missing, or the config does not fit.
  """
  topology_lib.on_any_machine()
  directory = os.path.join(workdir, "plan")
  plan.plan(config, topology or "", directory, search)
  log.info("plan: %s", directory)


MODE = Mode(
  name="plan",
  summary="Compiles the config for TPU slices on any machine: does it fit, and how fast can it be?",
  writes="plan/: a .json, .md and .png for each slice",
  run=run,
  checkpoint="none",
  processes="one",
  flags=("topology", "search"),
  needs_devices=False,
  checkpoint_hint="a plan needs no weights",
)
