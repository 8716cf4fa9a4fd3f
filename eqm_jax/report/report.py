"""Puts each claim of the paper beside what is measured here: models, claims, page.

Everything done is kept: models under `models/`, each claim's numbers under `claims/`,
its pictures under `figures/`. Run again, it goes on where it was.
"""

import contextlib
import datetime
import functools
import json
import logging
import os
import time
from collections.abc import Iterator

import jax
import ml_collections

import eqm_jax
from eqm_jax.evaluation import samplers
from eqm_jax.files import read_json, write_json
from eqm_jax.networks.dit import DiT
from eqm_jax.report import descent, landscape, page, quality, runs
from eqm_jax.report.lab import LAMBDA, Claim, Lab
from eqm_jax.training import checks

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


def report(config: ml_collections.ConfigDict, workdir: str):
  """Trains what is missing, measures what is missing, and writes the page.

  Writes index.html, report.json and figures/ into the workdir.

  Raises:
    ValueError: before training, if the config does not fit or the workdir holds a
      report with another one.
  """
  _check(config, workdir)
  with _quiet():
    _report(config, workdir)


def _report(config: ml_collections.ConfigDict, workdir: str):
  lab = Lab(config, workdir)
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Trainings and samplings say nothing of their own: one line for each model and claim is enough."""
  packages = [logging.getLogger(f"eqm_jax.{name}") for name in ("training", "evaluation")]
  levels = [package.level for package in packages]
  try:
    for package in packages:
      package.setLevel(logging.ERROR)
    yield
  finally:
    for package, level in zip(packages, levels):
      package.setLevel(level)


# The least of each option of which every claim can be made.
LEAST = {"seeds": 1, "samples": 20, "batch_size": 1, "held_out": 10, "evaluations": 4}


def _check(config: ml_collections.ConfigDict, workdir: str):
  if "report" not in config:
    raise ValueError("this config has no section 'report': use --config=configs/report.py, or report.py:quick")
  options = config.report
  for name, least in LEAST.items():
    if options[name] < least:
      raise ValueError(f"report.{name} = {options[name]} must be at least {least}")
  for name, expected in runs.EXPECTED.items():
    given = functools.reduce(lambda section, key: section[key], name.split("."), config)
    if given != expected:
      raise ValueError(
        f"{name} = {given!r}, but the report's claims are about {expected!r}, and what is compared with it"
      )
  batching = samplers.Batching(options.batch_size, jax.random.key(0), LAMBDA)
  row = next(iter(config.samplers.values())).copy_and_resolve_references()
  row.update(step_size=options.step_size, threshold=options.threshold, max_evaluations=options.evaluations)
  samplers.check("of the report", row, DiT(**config.model), batching)
  path, given = os.path.join(workdir, "config.json"), json.loads(config.to_json())
  if os.path.exists(path):
    differences = [
      f"{name}: {was!r} there, {now!r} given" for name, was, now in checks.differences(read_json(path), given)
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
    "made by": config.report.command,
    "data": "scikit-learn's 1,797 digits, 8 × 8 pixels; one in six is held out",
    "network": f"DiT, width {config.model.width}, depth {config.model.depth}, patch {config.model.patch_size}; "
    f"{config.train.steps} steps of batch {config.train.batch_size} for every model (l2: after "
    "as many of the implicit one)",
    "figures": f"mean ± standard deviation over {config.report.seeds} seeds, {config.report.samples} samples each; "
    "Fréchet distance in pixels to the training digits; no guidance",
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    "eqm_jax": eqm_jax.__version__,
  }
  write_json(os.path.join(workdir, "report.json"), {"facts": facts, "claims": claims})
  with open(os.path.join(workdir, "index.html"), "w", encoding="utf-8") as file:
    file.write(page.page(claims, facts))
