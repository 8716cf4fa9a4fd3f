"""Puts each claim of the paper beside what is measured here: models, claims, page.

Everything done is kept: models under `models/`, each claim's numbers under `claims/`,
its pictures under `figures/`. Run again, it goes on where it was.
"""

import datetime
import json
import logging
import os
import time

import jax
import ml_collections
from jax.sharding import Mesh

import eqm_jax
from eqm_jax.files import read_json, write_json
from eqm_jax.report import descent, landscape, page, quality, runs
from eqm_jax.report.lab import Claim, Lab
from eqm_jax.training import train

# Each with about how long it takes, the training of one implicit model being 1.
CLAIMS: dict[str, tuple[Claim, float]] = {
  "baselines": (quality.baselines, 3),
  "schedules": (quality.schedules, 4.5),
  "multipliers": (quality.multipliers, 1),
  "few_steps": (descent.few_steps, 2),
  "step_sizes": (descent.step_sizes, 6),
  "adaptive": (descent.adaptive, 2),
  "more_steps": (descent.more_steps, 3),
  "denoising": (landscape.denoising, 3),
  "outlier_detection": (landscape.outlier_detection, 0.5),
  "composition": (landscape.composition, 2),
  "memorisation": (landscape.memorisation, 0.5),
  "energies": (quality.energies, 4),
}

log = logging.getLogger(__name__)


def report(config: ml_collections.ConfigDict, workdir: str, mesh: Mesh):
  """Trains what is missing, measures what is missing, and writes the page.

  Writes index.html, report.json and figures/ into the workdir.

  Raises:
    ValueError: before training, if the config does not fit or the workdir holds a
      report with another one.
  """
  _check(config, workdir)
  # One line for each model and claim is enough; a training's own lines are for those who train.
  logging.getLogger("eqm_jax.training").setLevel(logging.WARNING)
  # Models that differ in their seed alone compile once.
  jax.config.update("jax_compilation_cache_dir", os.path.join(workdir, "compiled"))
  lab = Lab(config, workdir, mesh)
  os.makedirs(os.path.join(workdir, "claims"), exist_ok=True)

  models = [(name, seed) for seed in lab.seeds for name in runs.CHANGES if not lab.models.is_trained(name, seed)]
  claims = [name for name in CLAIMS if not os.path.exists(_claim_file(workdir, name))]
  log.info("to do: %d models, %d claims", len(models), len(claims))
  left = sum(runs.COST.get(name, 1) for name, _ in models) + sum(CLAIMS[name][1] for name in claims)
  clock = _Clock(left)
  for name, seed in models:
    try:
      lab.models(name, seed)
    except runs.Stopped:
      log.info("SIGTERM: saved; the same command goes on from here")
      return
    log.info("trained %s, seed %d; %s", name, seed, clock.done(runs.COST.get(name, 1)))
  for name in claims:
    function, cost = CLAIMS[name]
    claim = function(lab)
    write_json(_claim_file(workdir, name), claim)
    log.info("%s: %s; %s", name, claim["verdict"], clock.done(cost))
    _write_page(config, workdir)
  _write_page(config, workdir)
  log.info("report: %s", os.path.join(workdir, "index.html"))


def _check(config: ml_collections.ConfigDict, workdir: str):
  options = config.report
  for name in ("seeds", "samples", "batch_size", "held_out", "evaluations"):
    if options[name] < 1:
      raise ValueError(f"report.{name} = {options[name]} must be at least 1")
  if config.data.source != "digits" or config.data.options.part != "train":
    raise ValueError("a report needs data.source = 'digits' with data.options.part = 'train': it tests on the others")
  path, given = os.path.join(workdir, "config.json"), json.loads(config.to_json())
  if os.path.exists(path):
    differences = [
      f"{name}: {was!r} there, {now!r} given" for name, was, now in train.differences(read_json(path), given)
    ]
    if differences:
      raise ValueError(
        f"{workdir} holds a report with another config: {'; '.join(differences)}. Choose another --workdir"
      )
  os.makedirs(workdir, exist_ok=True)
  write_json(path, given)


class _Clock:
  """Tells the time that is left, from the share of the work that is done."""

  def __init__(self, total: float):
    self._total, self._done, self._begin = total, 0.0, time.monotonic()

  def done(self, work: float) -> str:
    self._done += work
    elapsed = time.monotonic() - self._begin
    left = elapsed / self._done * (self._total - self._done)
    return f"{datetime.timedelta(seconds=round(elapsed))} gone, {datetime.timedelta(seconds=round(left))} left"


def _claim_file(workdir: str, name: str) -> str:
  return os.path.join(workdir, "claims", f"{name}.json")


def _write_page(config: ml_collections.ConfigDict, workdir: str):
  claims = {
    name: read_json(_claim_file(workdir, name)) for name in CLAIMS if os.path.exists(_claim_file(workdir, name))
  }
  facts = {
    "made by": "python -m eqm_jax.main --config=configs/report.py --workdir=runs/report --mode=report",
    "data": "scikit-learn's 1,797 digits, 8 × 8 pixels; one in six is held out",
    "network": f"DiT, width {config.model.width}, depth {config.model.depth}, patch {config.model.patch_size}; "
    f"{config.train.steps} steps of batch {config.train.batch_size} for every model",
    "figures": f"mean ± standard deviation over {config.report.seeds} seeds, {config.report.samples} samples each; "
    "Fréchet distance in pixels to the training digits; no guidance",
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    "eqm_jax": eqm_jax.__version__,
  }
  write_json(os.path.join(workdir, "report.json"), {"facts": facts, "claims": claims})
  with open(os.path.join(workdir, "index.html"), "w", encoding="utf-8") as file:
    file.write(page.page(claims, facts))
