"""Mode report: the claims of the paper beside measurements."""

import ml_collections

from eqm_jax.modes import Mode
from eqm_jax.report import report


def run(config: ml_collections.ConfigDict, workdir: str):
  """Trains the models of the report that are missing, measures the claims that are missing, and writes the page.

  Raises:
    ValueError: before training, if the config does not fit or the workdir holds a report with another one.
  """
  report.report(config, workdir)


MODE = Mode(
  name="report",
  summary="Trains small models and compares the paper's claims with measurements.",
  writes="index.html, report.json, figures/, claims/, models/",
  run=run,
  checkpoint="none",
  processes="one",
  checkpoint_hint="a report trains its own models",
)
