"""The page of a run, report.html: its curves, samples and evaluation, and what it was run with.

It is made of the files in the workdir alone, and has what these have.
"""

import html
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from eqm_jax import distributed, hardware, pages
from eqm_jax.checkpoints import pretrained
from eqm_jax.evaluation import evaluator
from eqm_jax.io import atomic_write, read_json, write_json
from eqm_jax.training import metric_logger

FILE = "report.html"
ENVIRONMENT = "environment.json"  # what the run was last started with
PICTURES = os.path.join("evaluation", "steps")  # samples during training
MAX_PICTURES = 12  # steps, and samplers, that are shown
# metric → title, whether logarithmic. Others follow under their own names.
CURVES = {
  "loss": ("loss", True),
  "gradient_norm": ("gradient norm", True),
  "learning_rate": ("learning rate", False),
  "examples_per_second": ("images per second", False),
}
DISTANCE = "/frechet"  # ends the name of a metric of an evaluation
NOT_DRAWN = ("step", "examples_per_second_per_device", "_error", "_std", "_samples")  # ends of names

log = logging.getLogger(__name__)


def picture_path(workdir: str, step: int) -> str:
  """The picture of the samples at a step of training."""
  return os.path.join(workdir, PICTURES, f"{step:08d}.png")


def write_environment(workdir: str, mesh: Mesh):
  """Writes what the run is started with, for the page; all processes must call it."""
  computed_with = distributed.computed_with()
  if jax.process_index() == 0:
    kind, processes = jax.devices()[0].device_kind, jax.process_count()
    environment = {
      **evaluator.versions(),
      "devices": f"{jax.device_count()} × {kind} in {processes} process{'es' if processes > 1 else ''}",
      "mesh": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
      "cores": str(hardware.cores()),
      "computed with": "; ".join(computed_with),
    }
    write_json(os.path.join(workdir, ENVIRONMENT), environment)


def write(workdir: str):
  """Writes the page. What it cannot read, or a full disk, is a warning: neither concerns the run."""
  try:
    content = pages.document(f"Run {os.path.basename(os.path.abspath(workdir))}", list(_sections(workdir)))
    with atomic_write(os.path.join(workdir, FILE), "w") as file:
      file.write(content)
  except Exception as error:  # see above
    log.warning("%s: not written (%s: %s)", os.path.join(workdir, FILE), type(error).__name__, error)


def _sections(workdir: str) -> Iterator[str]:
  config = _read(workdir, pretrained.CONFIG)
  records = _records(workdir)
  if records:
    yield pages.facts(_summary(config, records))
  report = _read(workdir, "evaluation", "evaluation.json")
  if report:
    yield "<h2>Evaluation</h2>"
    yield from _evaluation(workdir, report)
  if records:
    yield "<h2>Curves</h2>"
    yield "<p>Over training steps.</p>"
    yield f'<div class="side-by-side">{"".join(_curves(records))}</div>'
  evaluations = [record for record in records if any(name.endswith(DISTANCE) for name in record)]
  pictures = [record for record in evaluations if os.path.exists(picture_path(workdir, record["step"]))]
  if pictures:
    yield "<h2>Samples during training</h2>"
    yield "<p>The same start noise and labels at every step.</p>"
    yield f'<div class="side-by-side">{"".join(_over_time(workdir, pictures))}</div>'
  environment = _read(workdir, ENVIRONMENT)
  if environment:
    yield "<h2>Environment</h2>" + pages.facts(environment)
  if config:
    text = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    yield f"<h2>Config</h2><details><summary>All keys</summary><pre>{text}</pre></details>"


def _read(*path: str) -> Any:
  """The content of a JSON file; an empty one where it does not exist."""
  return read_json(os.path.join(*path)) if os.path.exists(os.path.join(*path)) else {}


def _records(workdir: str) -> list[dict[str, Any]]:
  path = os.path.join(workdir, metric_logger.FILE)
  if not os.path.exists(path):
    return []
  with open(path, encoding="utf-8") as file:
    return [json.loads(line) for line in file if line.endswith("\n")]  # the last one of a killed run may be incomplete


def _column(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float | None]]:
  """The steps that have a metric, in order, and its values; an evaluation may end after later steps."""
  found = sorted((record["step"], record[name]) for record in records if record.get(name) is not None)
  return [step for step, _ in found], [value for _, value in found]


def _summary(config: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, str]:
  model, train = config["model"], config["train"]
  step = max(record["step"] for record in records)
  network = f"DiT, width {model['width']}, depth {model['depth']}, patch {model['patch_size']}"
  summary = {
    "network": network + (f", energy {model['energy']}" if model["energy"] != "none" else ""),
    "data": config["data"]["source"],
    "steps": f"{step:,} of {train['steps']:,}, of {train['batch_size']:,} images each",
  }
  _, loss = _column(records, "loss")
  if loss:
    summary["loss"] = f"{loss[-1]:.5g}"
  texts = {"examples_per_second": "{:,.4g} images/s", "data_wait": "{:.1%} of the time waiting for data"}
  texts |= {"mfu": "{:.1%} of the devices' peak rate (mfu)", "device_gib": "{:.3g} GiB on a device"}
  speed = {name: np.median(values) for name in texts if (values := _column(records, name)[1])}
  if speed:
    summary["throughput"] = ", ".join(texts[name].format(value) for name, value in speed.items()) + " (medians)"
  return summary


def _evaluation(workdir: str, report: dict[str, Any]) -> Iterator[str]:
  """The tables of the evaluation, and the samples of its first samplers."""
  weights, names = report["weights"], list(report["rows"])
  origin = weights["checkpoint"] if weights["step"] is None else f"step {weights['step']:,}"
  yield f"<p>{report['samples']:,} samples of each sampler; weights: {weights['kind']}, {html.escape(origin)}.</p>"
  for table in evaluator.tables(report):
    yield f"<p>{html.escape(table.heading)}</p>" + pages.text_table(table.columns, table.rows)
  links = [
    f'<a href="evaluation/samples_{html.escape(name)}.html">{html.escape(name)}</a>'
    for name in names
    if os.path.exists(os.path.join(workdir, "evaluation", f"samples_{name}.html"))
  ]
  if links:
    yield f"<p>Samples with their labels, NFE and norms: {', '.join(links)}.</p>"
  pictures = {f"samples_{name}": name for name in names[:MAX_PICTURES]}
  pictures[f"nearest_{names[0]}"] = f"{names[0]}, and the nearest real images"
  pictures |= {"descent": "descents: from noise to samples", "norms": "‖f‖ of these descents", "plane": "landscape"}
  yield '<div class="side-by-side">'
  for file, caption in pictures.items():
    path = os.path.join(workdir, "evaluation", f"{file}.png")
    if os.path.exists(path):
      yield _embedded(path, caption)
  yield "</div>"


def _curves(records: list[dict[str, Any]]) -> Iterator[str]:
  names = {name: None for record in records for name in record if not name.endswith(NOT_DRAWN)}  # a set, in order
  for name in [*CURVES, *(name for name in names if name not in CURVES)]:
    steps, values = _column(records, name)
    if values:
      title, is_log = CURVES.get(name, (name, False))
      yield pages.chart(title, steps, values, log=is_log)


def _over_time(workdir: str, records: Sequence[dict[str, Any]]) -> Iterator[str]:
  for i in np.unique(np.linspace(0, len(records) - 1, MAX_PICTURES).round().astype(int)):
    step = records[i]["step"]
    distances = [f"{name} {value:.4g}" for name, value in records[i].items() if name.endswith(DISTANCE)]
    yield _embedded(picture_path(workdir, step), ", ".join([f"step {step:,}", *distances]))


def _embedded(path: str, caption: str) -> str:
  with Image.open(path) as image:
    return pages.figure(pages.embedded(image), caption)
