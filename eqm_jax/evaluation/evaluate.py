"""Evaluates one model: sample → features → distances → files.

Writes into the output directory `evaluation.json`, the same as tables in
`evaluation.md`, and for people: a grid of samples per sampler, how many evaluations
the samples of adaptive ones used, and the way of some samples; for points of the plane the
samples over the data, and the landscape. While it works, `units/` has what is done.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import platform
from typing import Any

import jax
import ml_collections
import numpy as np

import eqm_jax
from eqm_jax import devices
from eqm_jax.convert.fingerprint import fingerprint
from eqm_jax.equilibrium import objective, sampler
from eqm_jax.evaluation import comparison, paths, pictures, plane, samplers, settings, tables
from eqm_jax.evaluation.parts import Parts
from eqm_jax.files import write_json
from eqm_jax.networks.dit import DiT

STATUS_NAMES = {sampler.CONVERGED: "converged", sampler.BUDGET: "budget", sampler.DIVERGED: "diverged"}
UNITS = "units"  # below the output directory
SHARED_SECONDS = 60.0  # until a shared disk shows what other processes have written
TOLD = ("frechet", "inception_score", "precision", "recall")  # of the scores, in the log

log = logging.getLogger(__name__)


def evaluate(
  config: ml_collections.ConfigDict,
  model: DiT,
  params: Any,
  known: comparison.Comparison,
  batching: samplers.Batching,
  directory: str,
  origin: dict[str, Any],
) -> dict[str, Any] | None:
  """Samples with every row of the config and compares with the real data.

  A killed evaluation goes on where it was. In a run of several processes each draws a share of the samples, and the
  first compares.

  Args:
    config: the whole config; `samplers` and `evaluation` are read.
    model, params: what to sample; `settings.check_options` and `check_data` have passed.
    known: the real data.
    batching: batch size, key and λ.
    directory: where the files go; made if it is not there.
    origin: of the weights, for the report.

  Returns:
    What `evaluation.json` holds; None in all processes but the first.

  Raises:
    ValueError: if the samples are not finite or all the same.
  """
  options = config.evaluation
  os.makedirs(directory, exist_ok=True)
  label_N = samplers.LABELS[options.labels](options.samples, model.num_classes, options.seed)
  series = {}
  for name in settings.rows_of(config):
    row = config.samplers[name]
    series[name] = known.draw(name, row, model, params, label_N, batching, os.path.join(directory, UNITS))
  devices.wait_for_all("the samples are drawn")
  try:
    if devices.process()[0] != 0:
      return None
    report = _about(options, model, params, known, batching, origin)
    for name, parts in series.items():
      parts.wait(SHARED_SECONDS)
      report["rows"][name] = _row(config, name, parts, known, label_N, batching, directory)
    _write(report, directory)  # whatever comes after it, what took long is there
    if options.timed:
      _time(config, report["rows"], model, params, label_N, batching)
      _write(report, directory)
    _draw_way(config, model, params, known, batching, directory)
    for parts in series.values():
      parts.remove()
    _tell_of_others(os.path.join(directory, UNITS))
    return report
  finally:  # a process that ended before the first one would be missed by it
    devices.wait_for_all("the samples are compared")


def _about(options, model: DiT, params: Any, known: comparison.Comparison, batching: samplers.Batching, origin):
  """All that the numbers depend on."""
  return {
    "samples": options.samples,
    "labels": options.labels,
    "seed": options.seed,
    "weights": {**origin, "kind": options.weights, "sha256": fingerprint(params)},
    "precision": {"network": model.dtype, "sampler": "float32", "features": "float32", "distances": "float64"}
    | ({"decoder": batching.decoder_dtype} if batching.decode else {}),
    "autoencoder": batching.autoencoder or None,
    "features": known.describe(),
    "versions": {"eqm_jax": eqm_jax.__version__, "python": platform.python_version()}
    | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    "computed_with": known.computed_with,
    "batch_size": batching.batch_size,
    "unit": options.unit,
    "rows": {},
  }


def _row(config, name: str, parts: Parts, known: comparison.Comparison, label_N, batching, directory: str):
  """What the report says of one sampler, and its pictures."""
  row, options, result = config.samplers[name], config.evaluation, Counted.of(parts)
  samplers.warn(name, row, result)
  try:
    found = {"scores": known.scores(parts)}
  except ValueError as error:
    raise ValueError(f"samplers.{name}: {error}") from error
  points_N = parts.array("raw.pool").reshape(-1, *plane.SHAPE) if known.in_plane else None
  if known.in_plane:
    found |= plane.distances(points_N, known.real_N)
  if options.label_agreement:
    found["label_agreement"] = known.label_agreement(parts, label_N)
  eta = {"eta": samplers.step_size_of(row, batching)} if samplers.is_descent(row) else {}
  seconds = float(result.seconds.sum()) / devices.process()[1]  # processes draw at the same time
  speed = {"seconds": seconds, "images_per_second": options.samples / seconds}
  told = {**row.to_dict(), **eta, **found, **_counts(result), **speed}
  _log_row(name, told)
  shown = plane.scatter(points_N, known.real_N) if known.in_plane else pictures.grid(known.shown(parts), 10)
  shown.save(os.path.join(directory, f"samples_{name}.png"))
  if row.threshold > 0:
    title = f"{name}: each sample stops at ‖f‖ ≤ {row.threshold:g}"
    histogram = pictures.evaluations_histogram(result.evaluations_B, row.max_evaluations, title)
    histogram.save(os.path.join(directory, f"evaluations_{name}.png"))
  if options.npz:
    parts.write_images(os.path.join(directory, f"{name}.npz"), label_N)
  return told


def _time(config, rows: dict[str, Any], model: DiT, params: Any, label_N: np.ndarray, batching: samplers.Batching):
  """Draws samples again, the samplers in turn, so that what disturbs the machine for a while disturbs all alike."""
  options = config.evaluation
  seconds = {name: [rows[name]["seconds"]] for name in options.timed}
  numbers = range(-(-options.samples // options.unit))
  for _ in range(options.repeats - 1):
    for name in seconds:
      row = config.samplers[name]
      again = samplers.draw_units(name, row, model, params, label_N, batching, options.unit, numbers)
      seconds[name].append(sum(drawn.seconds for _, drawn in again))
  for name in seconds:
    rows[name]["seconds"] = float(np.median(seconds[name]))
    rows[name]["images_per_second"] = options.samples / rows[name]["seconds"]


def _draw_way(config, model: DiT, params: Any, known: comparison.Comparison, batching, directory: str):
  """The way of one sample per class; in the plane, the landscape."""
  if config.evaluation.pictured == "none":
    return
  row = config.samplers[config.evaluation.pictured]
  if known.in_plane:
    plane.draw(row, model, params, known.real_N, schedule_of(config), batching, directory)
  else:
    few = samplers.balanced_labels(min(max(1, model.num_classes), 10), model.num_classes)
    paths.draw(row, model, params, few, batching, directory)


def _write(report: dict[str, Any], directory: str):
  write_json(os.path.join(directory, "evaluation.json"), report)
  with open(os.path.join(directory, "evaluation.md"), "w", encoding="utf-8") as file:
    file.write(tables.markdown(report))


def _tell_of_others(directory: str):
  """Units of other evaluations may be wanted yet; they are not removed, but should not be forgotten."""
  left = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
  if left:
    log.info("%s has units of evaluations that were not finished: %s", directory, ", ".join(left))
  else:
    with contextlib.suppress(OSError):
      os.rmdir(directory)


def schedule_of(config: ml_collections.ConfigDict) -> objective.Schedule:
  """c(γ) of what a config trains; flow matching has c ≡ 1."""
  if config.objective.kind == "equilibrium":
    return objective.Schedule(**config.objective.schedule)
  return objective.Schedule("constant", multiplier=1.0)


@dataclasses.dataclass(frozen=True)
class Counted:
  """What a series of samples took, [N] each; seconds and hardware evaluations of each unit."""

  evaluations_B: np.ndarray
  status_B: np.ndarray
  restarts_B: np.ndarray
  seconds: np.ndarray
  hardware: np.ndarray

  @classmethod
  def of(cls, parts: Parts) -> "Counted":
    return cls(*(parts.array(name) for name in ("evaluations", "status", "restarts", "seconds", "hardware")))


def _counts(result: Counted) -> dict[str, Any]:
  """What the samples took: the field's calls, and how many of the hardware's were for them."""
  evaluations = result.evaluations_B
  quantiles = {f"q{percent}": float(np.percentile(evaluations, percent)) for percent in (0, 10, 50, 90, 100)}
  hardware = round(float(result.hardware.sum()))
  return {
    "evaluations": {"mean": float(evaluations.mean()), **quantiles},
    "hardware_evaluations": hardware,
    "hardware_ratio": hardware / float(evaluations.sum()),
    "restarts": int(result.restarts_B.sum()),
    "status": {text: int(np.sum(result.status_B == code)) for code, text in STATUS_NAMES.items()},
  }


def _log_row(name: str, row: dict[str, Any]):
  told = {
    f"{space} {score}": found[score] for space, found in row["scores"].items() for score in TOLD if score in found
  }
  told |= {score: row[score] for score in ("label_agreement", "to_data", "from_data") if score in row}
  text = "  ".join(f"{score} {value:.3f}" for score, value in told.items())
  log.info("%s  %s  evaluations %.1f  %.1f s", name, text, row["evaluations"]["mean"], row["seconds"])
