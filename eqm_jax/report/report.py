"""Reports: each claim of the paper beside what is measured here, from the training of the models to the page.

All that is finished is kept: models under `models/`, each claim's numbers under `claims/`, its figures under
`figures/`. The same command resumes after them.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

import eqm_jax
from eqm_jax.checks import at_least, in_interval, one_of
from eqm_jax.io import read_json, write_json
from eqm_jax.networks.dit import DiT
from eqm_jax.progress import duration
from eqm_jax.report import lab, landscape_claims, page, sampling_claims, training_claims
from eqm_jax.sampling.generator import Generator
from eqm_jax.training import validation


@dataclasses.dataclass(frozen=True)
class _Measurement:
  """How a claim is measured."""

  claim: lab.Claim
  cost: float  # approximately; the training of one implicit model costs 1
  models: tuple[str, ...] = ("eqm",)  # trained before: names in lab.MODELS


CLAIMS = {  # in the order of the page
  "baselines": _Measurement(training_claims.baselines, 3, ("eqm", "flow_matching", "flow_matching_untimed")),
  "schedules": _Measurement(training_claims.schedules, 4.5, ("eqm", "piecewise", "linear", "flow_matching_untimed")),
  "gammas": _Measurement(training_claims.gammas, 7, tuple(training_claims.GAMMAS)),
  "multipliers": _Measurement(training_claims.multipliers, 1, ("eqm", "lambda_1", "lambda_2", "lambda_8")),
  "few_steps": _Measurement(sampling_claims.few_steps, 2),
  "step_sizes": _Measurement(sampling_claims.step_sizes, 6, ("eqm", "flow_matching")),
  "adaptive": _Measurement(sampling_claims.adaptive, 2),
  "more_steps": _Measurement(sampling_claims.more_steps, 3),
  "wall_clock": _Measurement(sampling_claims.wall_clock, 10, tuple(sampling_claims.TITLES)),
  "denoising": _Measurement(landscape_claims.denoising, 3, ("eqm", "flow_matching")),
  "outlier_detection": _Measurement(landscape_claims.outlier_detection, 0.5, ("eqm", "dot", "flow_matching_untimed")),
  "composition": _Measurement(landscape_claims.composition, 2),
  "noise_level": _Measurement(landscape_claims.noise_level, 0.5, tuple(landscape_claims.READ_OUT.values())),
  "memorisation": _Measurement(landscape_claims.memorisation, 0.5),
  "energies": _Measurement(training_claims.energies, 4, ("eqm", "dot", "scalar", "l2")),
  "modern_block": _Measurement(training_claims.modern_block, 4, ("eqm", "modern")),
}
TRAINING_COST = {"dot": 1.8, "scalar": 1.8, "l2": 1.8}  # relative to an implicit model
LEAST = {"seeds": 1, "num_samples": 20, "batch_size": 1, "num_held_out": 10, "max_nfe": 4}  # for every claim
TEXT = "report.text"  # may change without a new measurement

log = logging.getLogger(__name__)


def report(config: ml_collections.ConfigDict, workdir: str):
  """Trains the missing models, measures the missing claims, and writes the page.

  Writes index.html, report.json and figures/ into the workdir. The claims are those that `report.text.claims` names.

  Raises:
    ValueError: before training, if the config does not fit the claims, or the workdir holds a report with another one.
  """
  _check(config)
  _check_same_config(config, workdir)
  with _quiet():
    _report(config, workdir)


def _report(config: ml_collections.ConfigDict, workdir: str):
  instruments = lab.Lab(config, workdir)
  models = instruments.models
  os.makedirs(os.path.join(workdir, "claims"), exist_ok=True)
  needed = {model for name in _names(config) for model in CLAIMS[name].models}
  names = [name for name in lab.MODELS if name in needed]
  to_train = [(name, seed) for seed in instruments.seeds for name in names if not models.is_trained(name, seed)]
  claims = [name for name in _names(config) if not os.path.exists(_claim_file(workdir, name))]
  log.info("to do: %d models, %d claims", len(to_train), len(claims))
  training_costs = [TRAINING_COST[name] if name in TRAINING_COST else 1 for name, _ in to_train]
  clock = _Clock(sum(training_costs) + sum(CLAIMS[name].cost for name in claims))
  for (name, seed), cost in zip(to_train, training_costs):
    try:
      models.load(name, seed)
    except lab.Preempted:
      log.info("SIGTERM: saved; the same command resumes here")
      return
    log.info("trained %s, seed %d; %s", name, seed, clock.advance(cost))
  for name in claims:
    claim = CLAIMS[name].claim(instruments)
    write_json(_claim_file(workdir, name), claim)
    log.info("%s: %s; %s", name, claim["verdict"], clock.advance(CLAIMS[name].cost))
    _write_page(config, workdir)
  _write_page(config, workdir)
  log.info("report: %s", os.path.join(workdir, "index.html"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences the messages of trainings and evaluations: one line for each model and claim is enough."""
  packages = [logging.getLogger(f"eqm_jax.{name}") for name in ("training", "evaluation")]
  levels = [package.level for package in packages]
  try:
    for package in packages:
      package.setLevel(logging.ERROR)
    yield
  finally:
    for package, level in zip(packages, levels):
      package.setLevel(level)


def _check(config: ml_collections.ConfigDict):
  """Refuses a config that the claims cannot be measured with."""
  if "report" not in config:
    raise ValueError("this config has no section 'report': use --config=configs/report.py, or report.py:quick")
  options = config.report
  for name, least in LEAST.items():
    at_least(f"report.{name}", options[name], least)
  for name in options.text.claims:
    one_of("report.text.claims", name, CLAIMS)
  for name, expected in lab.EXPECTED.items():
    *sections, key = name.split(".")
    section = functools.reduce(lambda section, key: section[key], sections, config)
    value = section[key] if key in section else None
    if value != expected:
      raise ValueError(
        f"{name} = {value!r}, but the report's claims are about {expected!r} and its changes: leave it there"
      )
  if len(options.composed_labels) != 2:
    raise ValueError(f"report.composed_labels = {tuple(options.composed_labels)} must be two labels: give one pair")
  for label in options.composed_labels:
    in_interval("report.composed_labels", label, 0, config.model.num_classes, open_high=True)
  generator = Generator(DiT(**config.model), None, jax.random.key(0), options.batch_size, lab.MULTIPLIER)
  row = next(iter(config.samplers.values())).copy_and_resolve_references()
  row.update(step_size=options.step_size, threshold=options.threshold, max_nfe=options.max_nfe)
  generator.check("report", row)


def _check_same_config(config: ml_collections.ConfigDict, workdir: str):
  """Refuses a workdir with a report of another config; its texts may differ."""
  path, requested = os.path.join(workdir, "config.json"), json.loads(config.to_json())
  if os.path.exists(path):
    saved = read_json(path)
    version = saved.pop(validation.VERSION, validation.FIRST_VERSION)
    differing = [
      f"{name}: {before!r} in the workdir, {now!r} in this config"
      for name, before, now in validation.differences(saved, requested)
      if not name.startswith(TEXT)
    ]
    if differing:
      raise ValueError(
        f"{workdir} holds a report with another config: {'; '.join(differing)}. It was written by eqm_jax {version}: "
        "choose another --workdir"
      )
  os.makedirs(workdir, exist_ok=True)
  write_json(path, requested | {validation.VERSION: eqm_jax.__version__})


class _Clock:
  """Estimates the time left from the cost of what is finished."""

  def __init__(self, total: float):
    self._total, self._finished, self._begin = total, 0.0, time.monotonic()

  def advance(self, cost: float) -> str:
    self._finished += cost
    elapsed = time.monotonic() - self._begin
    left = elapsed / self._finished * (self._total - self._finished)
    return f"{duration(elapsed)} gone, {duration(left)} left"


def _names(config: ml_collections.ConfigDict) -> list[str]:
  """The claims of a config, in the order of the page."""
  return [name for name in CLAIMS if name in config.report.text.claims]


def _claim_file(workdir: str, name: str) -> str:
  return os.path.join(workdir, "claims", f"{name}.json")


def _claim_entry(config: ml_collections.ConfigDict, workdir: str, name: str) -> dict[str, Any]:
  """A measured claim with its texts."""
  title, paper = config.report.text.claims[name]
  return {"title": title, "paper": paper, **read_json(_claim_file(workdir, name))}


def _write_page(config: ml_collections.ConfigDict, workdir: str):
  options, text = config.report, config.report.text
  measured = [name for name in _names(config) if os.path.exists(_claim_file(workdir, name))]
  claims = {name: _claim_entry(config, workdir, name) for name in measured}
  facts = {
    "command": options.command,
    "data": text.data,
    "network": f"DiT, width {config.model.width}, depth {config.model.depth}, patch {config.model.patch_size}; "
    f"{config.train.steps} steps of batch {config.train.batch_size} for every model (l2: after "
    "as many of the implicit one)",
    "figures": f"mean ± standard deviation over {options.seeds} seeds, {options.num_samples} samples each; "
    "Fréchet distance in pixels to the training images; no guidance",
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    "eqm_jax": eqm_jax.__version__,
  }
  write_json(os.path.join(workdir, "report.json"), {"facts": facts, "claims": claims})
  with open(os.path.join(workdir, "index.html"), "w", encoding="utf-8") as file:
    file.write(page.page(text.title, text.description, facts, claims))
