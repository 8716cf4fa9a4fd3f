"""Evaluation of one model: samples, their features, metrics, files.

Writes into the output directory `evaluation.json`, the same as tables in `evaluation.md`, and pictures: a grid of
samples for each sampler, the first of them with their nearest real images, a histogram of the NFE of adaptive ones, and
a few trajectories; for points of the plane the samples over the data, and the landscape. While it works, `chunks/` has
the finished chunks of samples.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import tabulate
from PIL import Image

import eqm_jax
from eqm_jax import distributed, plotting
from eqm_jax.equilibrium import gamma, objective, oracle
from eqm_jax.equilibrium.sampler import Status
from eqm_jax.evaluation import plane, validation
from eqm_jax.evaluation.reference_data import PREVIEW, ReferenceData
from eqm_jax.io import write_json
from eqm_jax.progress import waiting
from eqm_jax.sampling import generator as generator_lib
from eqm_jax.sampling import labels as labels_lib
from eqm_jax.sampling import samples_page, trajectories
from eqm_jax.sampling.generator import Generator
from eqm_jax.sampling.sample_store import SampleStore
from eqm_jax.trees import fingerprint

CHUNKS = "chunks"  # below the output directory
SHARED_SECONDS = 60.0  # until a shared disk shows what other processes have written
LOGGED_METRICS = ("frechet", "inception_score", "mind", "precision", "recall")
EXTRA_METRICS = ("classifier_accuracy", "to_data", "from_data")  # of a sampler, without features
# metric → title of its column, digits, and the key of its uncertainty
COLUMNS = {
  "frechet": ("Fréchet", 3, "frechet_error"),
  "spatial_frechet": ("spatial Fréchet", 3, "spatial_frechet_error"),
  "inception_score": ("inception score", 2, "inception_score_std"),
  "kernel_distance": ("kernel distance", 4, "kernel_distance_std"),
  "mind": ("MIND", 3, "mind_error"),
  "precision": ("precision", 3, "precision_error"),
  "recall": ("recall", 3, "recall_error"),
  "nearest": ("nearest real", 3, None),
}
NEIGHBOUR_COLUMNS, NEIGHBOUR_ROWS = 10, 3  # samples that are shown with their nearest real images

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Cost:
  """NFE, status and restarts of a sample set's samples, [N] each; seconds and executed NFE of its chunks."""

  nfe: np.ndarray
  status: np.ndarray
  restarts: np.ndarray
  seconds: np.ndarray
  executed_nfe: np.ndarray

  @classmethod
  def of(cls, store: SampleStore) -> "Cost":
    return cls(**{field.name: store.array(field.name) for field in dataclasses.fields(cls)})

  def summary(self) -> dict[str, Any]:
    """The cost as a report has it."""
    quantiles = {f"q{percent}": float(np.percentile(self.nfe, percent)) for percent in (0, 10, 50, 90, 100)}
    executed = round(float(self.executed_nfe.sum()))
    finished = (Status.CONVERGED, Status.BUDGET, Status.DIVERGED)
    return {
      "nfe": {"mean": float(self.nfe.mean()), **quantiles},
      "executed_nfe": executed,
      "utilisation": float(self.nfe.sum()) / executed,
      "restarts": int(self.restarts.sum()),
      "status": {status.name.lower(): int(np.sum(self.status == status)) for status in finished},
    }


def evaluate(
  config: ml_collections.ConfigDict,
  generator: Generator,
  reference: ReferenceData,
  directory: str,
  origin: dict[str, Any],
) -> dict[str, Any] | None:
  """Samples with every requested row of the config and compares with the real data.

  A killed evaluation resumes after its last finished chunk. In a run of several processes each samples a share, and
  the first one compares.

  Args:
    config: the whole config; `samplers` and `evaluation` are read.
    generator: the model to sample from; `validation.check_options` and `check_data` have passed.
    reference: the real data.
    directory: of the files; created if it does not exist.
    origin: of the weights, for the report.

  Returns:
    The contents of `evaluation.json`; None in all processes but the first.

  Raises:
    ValueError: if the samples are not finite or all the same.
  """
  options = config.evaluation
  os.makedirs(directory, exist_ok=True)
  labels = requested_labels(options, options.num_samples, generator.model.num_classes)
  stores = {
    name: reference.sample(name, config.samplers[name], labels, generator, os.path.join(directory, CHUNKS))
    for name in validation.evaluated_samplers(config)
  }
  distributed.wait_for_all("sampled")
  try:
    if distributed.process_index_and_count()[0] != 0:
      return None
    report = _settings(options, generator, reference, origin)
    for name, store in stores.items():
      store.wait(SHARED_SECONDS)
      report["rows"][name] = _evaluate_row(config, name, store, reference, generator=generator, labels=labels)
      _write_pictures(config, name, store, reference, directory, labels=labels, generator=generator)
      if options.save_npz:
        store.write_images(os.path.join(directory, f"{name}.npz"), labels)
    _write(report, directory)  # before anything that may fail: sampling took long
    if options.benchmark_samplers:
      _benchmark_samplers(config, report["rows"], generator, labels)
      _write(report, directory)
    with waiting("plotting trajectories"):
      _plot_trajectories(config, generator, reference, directory)
    for store in stores.values():
      store.remove()
    _log_leftovers(os.path.join(directory, CHUNKS))
    return report
  finally:  # the first process would miss one that ended before it
    distributed.wait_for_all("compared")


def requested_labels(options: ml_collections.ConfigDict, count: int, num_classes: int) -> np.ndarray:
  """The labels that the section `evaluation` asks for, [count]."""
  return labels_lib.parse("evaluation.labels", options.labels, count, num_classes, seed=options.seed)


def flat(metrics: dict[str, dict[str, float | None]]) -> dict[str, float]:
  """Metrics by kind of features as one dict, "raw/frechet" and so on; those that could not be computed are left out."""
  named = {f"{space}/{name}": value for space, values in metrics.items() for name, value in values.items()}
  return {name: value for name, value in named.items() if value is not None}


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that results depend on, for reports."""
  packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
  return {"eqm_jax": eqm_jax.__version__, "python": platform.python_version()} | packages


def _settings(options, generator: Generator, reference: ReferenceData, origin: dict[str, Any]) -> dict[str, Any]:
  """Everything that the numbers of a report depend on, and no rows yet."""
  precision = {"network": generator.model.dtype, "sampler": "float32", "features": "float32", "distances": "float64"}
  if generator.decoder:
    precision["decoder"] = generator.decoder_dtype
  return {
    "samples": options.num_samples,
    "labels": options.labels,
    "seed": options.seed,
    "weights": {**origin, "kind": options.weights, "sha256": fingerprint(generator.params)},
    "precision": precision,
    "autoencoder": generator.autoencoder_id or None,
    "features": reference.describe(),
    "versions": versions(),
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    "computed_with": reference.computed_with,
    "batch_size": generator.batch_size,
    "chunk_size": options.chunk_size,
    "rows": {},
  }


def _evaluate_row(
  config, name: str, store: SampleStore, reference: ReferenceData, *, generator: Generator, labels: np.ndarray
) -> dict[str, Any]:
  """Settings, metrics and cost of one sampler."""
  row, options, cost = config.samplers[name], config.evaluation, Cost.of(store)
  generator_lib.warn_unfinished(name, row, cost)
  try:
    with waiting(f"{name}: metrics"):
      result = {"metrics": reference.metrics(store)}
  except ValueError as error:
    raise ValueError(f"samplers.{name}: {error}") from error
  if reference.in_plane:
    result |= plane.distances(_points(store), reference.real_N)
  if options.classifier_accuracy:
    result["classifier_accuracy"] = reference.classifier_accuracy(store, labels)
  if generator_lib.is_descent(row):
    result["eta"] = generator.step_size(row)
  seconds = float(cost.seconds.sum()) / distributed.process_index_and_count()[1]  # processes sample at the same time
  speed = {"seconds": seconds, "images_per_second": options.num_samples / seconds}
  result = {**row.to_dict(), **result, **cost.summary(), **speed}
  _log_row(name, result)
  return result


def picture(
  store: SampleStore,
  reference: ReferenceData,
  columns: int,
  count: int | None = None,
  captions: Sequence[str] | None = None,
) -> Image.Image:
  """The first `count` samples (at most, and without it, those that are kept as images); in the plane all, as points."""
  if reference.in_plane:
    return plane.scatter(_points(store), reference.real_N)
  return plotting.grid(reference.preview(store)[:count], columns, captions=captions)


def _write_pictures(
  config,
  name: str,
  store: SampleStore,
  reference: ReferenceData,
  directory: str,
  *,
  labels: np.ndarray,
  generator: Generator,
):
  """The samples as a grid and as a page, and the NFE of an adaptive sampler."""
  row = config.samplers[name]
  captions = generator.captions(labels[:PREVIEW])
  columns = labels_lib.columns(config.evaluation.labels, generator.model.num_classes)
  grid = picture(store, reference, columns, captions=captions)
  grid.save(os.path.join(directory, f"samples_{name}.png"))
  if not reference.in_plane:
    samples_page.write(
      os.path.join(directory, f"samples_{name}.html"),
      f"Samples: {name}",
      reference.preview(store),
      label_N=labels,
      names=generator.label_names,
      **{f"{key}_N": store.array(key) for key in ("nfe", "norm", "status")},
    )
    _write_neighbours(os.path.join(directory, f"nearest_{name}.png"), store, reference)
  if row.threshold:
    title = f"{name}: each sample stops at {generator_lib.stop_condition(row)}"
    histogram = plotting.nfe_histogram(store.array("nfe"), row.max_nfe, title)
    histogram.save(os.path.join(directory, f"nfe_{name}.png"))


def _write_neighbours(path: str, store: SampleStore, reference: ReferenceData):
  """Rows of samples, and below each its nearest real image in each kind of features that has real images."""
  rows = {"samples": reference.preview(store)[: NEIGHBOUR_COLUMNS * NEIGHBOUR_ROWS]}
  found = reference.neighbours(store, len(rows["samples"]))
  if not found:
    return
  height, width = rows["samples"].shape[1:3]
  rows |= {f"nearest real images, {name}": _resized(images, height, width) for name, images in found.items()}
  shown, captions = [], []
  for first in range(0, len(rows["samples"]), NEIGHBOUR_COLUMNS):
    for name, images in rows.items():
      part = images[first : first + NEIGHBOUR_COLUMNS]
      shown.append(
        np.pad(plotting.to_uint8(part), [(0, NEIGHBOUR_COLUMNS - len(part)), *[(0, 0)] * 3], constant_values=255)
      )
      captions += plotting.row_captions([name], NEIGHBOUR_COLUMNS)
  plotting.grid(np.concatenate(shown), NEIGHBOUR_COLUMNS, captions=captions).save(path)


def _resized(images: np.ndarray, height: int, width: int) -> np.ndarray:
  """Real images at the size of samples: features of published networks compare images of different sizes."""
  if images.shape[1:3] == (height, width):
    return images
  pixels = (Image.fromarray(one) for one in plotting.to_uint8(images))
  return np.stack([np.asarray(one.resize((width, height), Image.Resampling.BICUBIC)) for one in pixels])


def _points(store: SampleStore) -> np.ndarray:
  """Samples of the plane, [N, 1, 1, 2]."""
  return store.array("raw.pool").reshape(-1, *plane.SHAPE)


def _benchmark_samplers(config, rows: dict[str, Any], generator: Generator, labels: np.ndarray):
  """Samples again, the samplers in turn, so that a disturbance of the machine affects all of them alike."""
  options = config.evaluation
  seconds = {name: [rows[name]["seconds"]] for name in options.benchmark_samplers}
  numbers = range(-(-options.num_samples // options.chunk_size))
  for _ in range(options.benchmark_repeats - 1):
    for name in seconds:
      chunks = generator.chunks(name, config.samplers[name], labels, options.chunk_size, numbers)
      seconds[name].append(sum(samples.seconds for _, samples in chunks))
  for name in seconds:
    rows[name]["seconds"] = float(np.median(seconds[name]))
    rows[name]["images_per_second"] = options.num_samples / rows[name]["seconds"]


def _plot_trajectories(config, generator: Generator, reference: ReferenceData, directory: str):
  """Trajectories of one sample per class; in the plane, the landscape."""
  if config.evaluation.plot_sampler is None:
    return
  row = config.samplers[config.evaluation.plot_sampler]
  if reference.in_plane:
    density, schedule = gamma.GammaDensity(**config.objective.gamma), objective.schedule_of(config.objective)
    optimal = oracle.oracle_field(reference.real_N[: plane.ORACLE_POINTS], schedule, density=density)
    plane.plot(generator, row, reference.real_N, optimal, directory)
    return
  num_classes = generator.model.num_classes
  labels = labels_lib.parse("evaluation.plot_sampler", "balanced", min(max(1, num_classes), 10), num_classes)
  trajectories.plot(generator, row, labels, directory)


def _write(report: dict[str, Any], directory: str):
  write_json(os.path.join(directory, "evaluation.json"), report)
  with open(os.path.join(directory, "evaluation.md"), "w", encoding="utf-8") as file:
    file.write(markdown(report))


def _log_leftovers(directory: str):
  """Names chunks of other evaluations: they may still be needed, so they are kept, but should not be forgotten."""
  left = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
  if left:
    log.info("%s has chunks of unfinished evaluations: %s", directory, ", ".join(left))
  else:
    with contextlib.suppress(OSError):
      os.rmdir(directory)


def _log_row(name: str, row: dict[str, Any]):
  values = {
    f"{space} {metric}": result[metric]
    for space, result in row["metrics"].items()
    for metric in LOGGED_METRICS
    if metric in result
  }
  values |= {metric: row[metric] for metric in EXTRA_METRICS if metric in row}
  text = "  ".join(f"{metric} {value:.3f}" for metric, value in values.items())
  log.info("%s  %s  NFE %.1f  %.1f s", name, text, row["nfe"]["mean"], row["seconds"])


@dataclasses.dataclass(frozen=True)
class Table:
  """A part of a report: cells are text."""

  heading: str  # "": none
  columns: list[str]
  rows: list[list[str]]


def markdown(report: dict[str, Any]) -> str:
  """A report in Markdown."""
  parts = []
  for table in tables(report):
    drawn = tabulate.tabulate(table.rows, headers=table.columns, tablefmt="github", disable_numparse=True)
    parts += [table.heading, drawn] if table.heading else [drawn]
  return "\n\n".join(parts) + "\n"


def tables(report: dict[str, Any]) -> list[Table]:
  """A report as tables: one of the samplers, and one of the metrics for each kind of features."""
  return [_samplers_table(report["rows"])] + [
    _metrics_table(name, described, report["rows"])
    for name, described in report["features"].items()
    if name != "classifier_accuracy"
  ]


def _samplers_table(rows: dict[str, Any]) -> Table:
  extra = [metric for metric in EXTRA_METRICS if any(metric in row for row in rows.values())]
  titles = ["sampler", "rule", "η", *(metric.replace("_", " ") for metric in extra)]
  titles += ["NFE (10 % – 90 %)", "utilisation", "seconds", "images/s"]
  lines = []
  for name, row in rows.items():
    nfe = row["nfe"]
    cells = [name, row["rule"], f"{row['eta']:.3g}" if "eta" in row else "–", *(f"{row[key]:.3f}" for key in extra)]
    cells.append(f"{nfe['mean']:.1f} ({nfe['q10']:.0f} – {nfe['q90']:.0f})")
    cells += [f"{row['utilisation']:.2f}", f"{row['seconds']:.1f}", f"{row['images_per_second']:.0f}"]
    lines.append(cells)
  return Table("", titles, lines)


def _metrics_table(name: str, described: dict[str, Any], rows: dict[str, Any]) -> Table:
  shown = [metric for metric in COLUMNS if any(metric in row["metrics"][name] for row in rows.values())]
  settings = ", ".join(f"{key} {_short(value)}" for key, value in described.items() if key not in ("name", "real"))
  halves = described["real"].get("frechet_between_halves")
  count = described["real"].get("samples", "an unrecorded number of")  # in ADM's and pytorch-fid's files
  heading = f"Features: {name}{f' ({settings})' if settings else ''}; {count} real samples"
  if halves is not None:
    heading += f"; Fréchet distance between halves of them {halves:.3f}"
  if "nearest_other" in described["real"]:
    heading += f", median distance to the nearest other one {described['real']['nearest_other']:.3f}"
  compared = {row["metrics"][name].get("mind_samples") for row in rows.values()} - {None}
  if compared:
    heading += f"; MIND of {max(compared)} samples and as many real ones"
  lines = [[sampler, *(_cell(row["metrics"][name], metric) for metric in shown)] for sampler, row in rows.items()]
  return Table(heading, ["sampler", *(COLUMNS[metric][0] for metric in shown)], lines)


def _short(value: Any) -> str:
  return f"{value:.3f}" if isinstance(value, float) else str(value)[:12]


def _cell(metrics: dict[str, float], metric: str) -> str:
  _, digits, uncertainty = COLUMNS[metric]
  if metric not in metrics:
    return "–"
  error = metrics.get(uncertainty)
  return f"{metrics[metric]:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")
