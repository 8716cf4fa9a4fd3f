"""The suite of a benchmark: its cases in their order, sweeps over sizes, and the files of the results."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from PIL import Image

from eqm_jax import plotting
from eqm_jax.benchmark import measure, network_cases, pipeline_cases, results
from eqm_jax.benchmark.network_cases import NotApplicable, Workspace
from eqm_jax.benchmark.results import Row
from eqm_jax.checkpoints.pretrained import Pretrained
from eqm_jax.checks import at_least, one_of
from eqm_jax.data.codec import Codec
from eqm_jax.evaluation import features
from eqm_jax.io import write_json
from eqm_jax.networks.dit import DiT
from eqm_jax.progress import Progress
from eqm_jax.training import sharding

CASES: dict[str, Callable[[Workspace], list[Row]]] = {  # the network first: it explains the others
  "forward": network_cases.forward,
  "training step": network_cases.training_step,
  "evaluation": network_cases.evaluation,
  "guided evaluation": network_cases.guided_evaluation,
  "batching of descents": network_cases.batching,
  "EqM-E": network_cases.energy_cases,
  "reading data": pipeline_cases.reading,
  "training with data": pipeline_cases.training_loop,
  "training, encoding online": pipeline_cases.online_training_loop,
  "checkpoint save": pipeline_cases.checkpoint_save,
  "decoder": pipeline_cases.decoder,
  "Inception features": functools.partial(pipeline_cases.published_features, "inception"),
  "DINOv2 features": functools.partial(pipeline_cases.published_features, "dinov2"),
  "classifier features": pipeline_cases.classifier_features,
  "metrics": pipeline_cases.metric_cases,
}
SWEEPS = {  # with the labels of their axes
  "batch": "samples in a batch",
  "tokens": "tokens of a sample",
  "depth": "blocks",
  "samples": "samples in all",
  "devices": "devices, for the same samples in all",
}
LEAST = {"turns": 1, "batch_size": 1, "nfe": 1, "num_samples": 1, "steps": 0}
LEAST |= {"metrics.samples": 0, "metrics.real": 10, "metrics.size": 1}

Peaks = dict[str, dict[str, float]]

log = logging.getLogger(__name__)


def benchmark(
  config: ml_collections.ConfigDict,
  directory: str,
  *,
  codec: Codec | None = None,
  trained: Pretrained | None = None,
  compare: str | None = None,
  compare_any: bool = False,
):
  """Measures a config on the devices of this process.

  Writes benchmark.json, benchmark.md and the pictures of the sweeps into `directory`.

  Args:
    config: the whole config; its section `benchmark` has the settings.
    directory: of the results.
    codec: the config's autoencoder; without it the decoder has random weights.
    trained: the model whose stopping times are measured; without it they are synthetic.
    compare: an earlier benchmark.json to compare with.
    compare_any: compares also with another config or machine.

  Raises:
    ValueError: before anything is measured, if an option is out of range, the model does not fit the memory, or
      `compare` is not comparable.
  """
  _check_options(config.benchmark)
  _check_model(config, trained)
  devices = jax.local_devices()
  machine = results.describe_machine(devices)
  old = results.read(compare) if compare else None
  if old and not compare_any:
    results.check_comparable(compare, old, machine, results.comparable_config(config))
  w = Workspace(config, devices, directory, trained, codec)
  memory = measure.check_training_memory(config, w.state_shapes, w.shardings, devices)
  _check_sweeps(w)
  log.info("benchmark on %s", results.machine_sentence(machine))
  # The case with the longest compilation and the most memory; the compiler's number is exact.
  measure.check_fits("the compiled training step", w.step_program.bytes, memory["available"])
  os.makedirs(directory, exist_ok=True)

  content = {"kind": results.KIND, "machine": machine, **results.config_entries(config), "memory": memory}
  content |= _measure_cases(w) | {"sweeps": {}}
  _write(directory, content)
  log.info("%s", results.markdown(content))
  for name in config.benchmark.sweeps.over:
    content["sweeps"][name] = _measure_sweep(name, w, content["peaks"])
    _write(directory, content)  # a sweep takes minutes: the finished ones are not lost if the next one is killed
  if old:
    log.info("compared with %s\n%s", compare, results.comparison(old, content))


def _measure_cases(w: Workspace) -> dict[str, Any]:
  """The entries `peaks`, `rows`, and `skipped`: why a case has no row."""
  before = _measure_peaks(w)
  rows, skipped = [], {}
  with Progress(total=len(CASES), desc="benchmark", unit="case") as bar:
    for name, case in CASES.items():
      try:
        rows += _measure_case(w, case)
      except NotApplicable as reason:
        skipped[name] = str(reason)
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
        skipped[name] = f"does not fit the memory: {str(error).splitlines()[0]}"
      if name in skipped:
        log.info("%s: left out, %s", name, skipped[name])
      bar.update()
  after = _measure_peaks(w)  # a shared machine may have been slow at the beginning
  peaks = {name: max(before[name], after[name], key=lambda peak: peak["flops_per_second"]) for name in before}
  return {"peaks": peaks, "rows": {row.name: row.entry(peaks) for row in rows}, "skipped": skipped}


def _measure_case(w: Workspace, case: Callable[[Workspace], list[Row]]) -> list[Row]:
  """The rows of a case, with the peak memory."""
  with measure.peak_process_memory() as peak:
    rows = case(w)
  for row in rows:
    row.process_bytes = row.process_bytes or (peak[0] if peak else None)
    row.device_bytes = measure.peak_device_memory(w.devices)
    log.info("%s", results.line(row))
  return rows


def _measure_peaks(w: Workspace) -> Peaks:
  """The matrix-product peak of every precision that a case of the config computes in."""
  precisions = ["float32", w.config.model.dtype]
  if w.config.autoencoder.path:
    precisions.append(w.config.autoencoder.dtype)
  if set(w.config.evaluation.features) & set(features.IMAGE_FEATURES):
    precisions.append("float32 exact")
  peaks = {}
  for precision in dict.fromkeys(precisions):
    if precision == "float32 exact" and w.devices[0].platform == "cpu":
      peaks[precision] = peaks["float32"]  # a CPU never rounds the factors
    else:
      peaks[precision] = measure.product_peak(precision, w.devices, w.turns)
    rate, side = peaks[precision]["flops_per_second"], peaks[precision]["side"]
    log.info("matrix products, %s: %.4g GFLOP/s at %d × %d", precision, rate / 1e9, side, side)
  return peaks


def _measure_sweep(name: str, w: Workspace, peaks: Peaks) -> dict[str, Any]:
  """A sweep, {"x": values, "series": {case: {"seconds": of one sample, "fraction_of_peak"}}}."""
  points, series = _points(name, w), {}
  for value in Progress(list(points), desc=f"sweep over {name}", unit="point"):
    point = points[value]
    # Forced devices of a CPU share its cores: any number of them reaches the whole peak.
    share = 1 if point.devices[0].platform == "cpu" else len(point.devices) / jax.local_device_count()
    for row in _sweep_rows(name, point):
      curve = series.setdefault(row.name, {"seconds": [], "fraction_of_peak": []})
      curve["seconds"].append(row.seconds / row.images)
      peak = peaks[row.precision]["flops_per_second"] * share
      curve["fraction_of_peak"].append(row.flops / row.seconds / peak)
  return {"x": list(points), "series": series}


def _sweep_rows(name: str, w: Workspace) -> list[Row]:
  cases = [network_cases.training_step, network_cases.evaluation, network_cases.guided_evaluation]
  rows = []
  for case in [network_cases.batching] if name == "samples" else cases:
    with contextlib.suppress(NotApplicable):
      rows += case(w)
  return rows


def _points(name: str, w: Workspace) -> dict[int, Workspace]:
  """A workspace for every point of a sweep."""
  if name == "devices":
    counts = [2**k for k in range(len(w.devices).bit_length())]
    return {count: _with_devices(w, count) for count in counts}
  points = {}
  for value in w.config.benchmark.sweeps[name]:
    changes = {
      "batch": {"train.batch_size": value, "benchmark.batch_size": value, "train.grad_accum_steps": 1},
      "tokens": {"model.input_size": math.isqrt(value) * w.config.model.patch_size},
      "depth": {"model.depth": value},
      "samples": {"benchmark.num_samples": value},
    }
    points[value] = _with_changes(w, changes[name])
  return points


def _with_changes(w: Workspace, changes: dict[str, int]) -> Workspace:
  config = w.config.copy_and_resolve_references()
  config.benchmark.batch_size = w.batch_size  # a number, where the config says None
  config.update_from_flattened_dict(changes)
  return dataclasses.replace(w, config=config)


def _with_devices(w: Workspace, count: int) -> Workspace:
  """Data parallelism over the first devices, with as many samples in all as on one device."""
  changes = {"mesh.dcn_data": 1, "mesh.data": count, "mesh.fsdp": 1, "mesh.tensor": 1}
  changes["benchmark.batch_size"] = max(1, w.batch_size // count)
  return dataclasses.replace(_with_changes(w, changes), devices=w.devices[:count])


def picture(name: str, sweep: dict[str, Any]) -> Image.Image:
  """Seconds of a sample, and the fraction of the peak, over the values of a sweep."""
  figure, (left, right) = plotting.figure(9, 3.4, columns=2)
  for case, curve in sweep["series"].items():
    left.plot(sweep["x"], [1e3 * seconds for seconds in curve["seconds"]], marker="o", markersize=4, label=case)
    right.plot(sweep["x"], [100 * share for share in curve["fraction_of_peak"]], marker="o", markersize=4, label=case)
  left.set(xlabel=SWEEPS[name], ylabel="ms of one sample", xscale="log", yscale="log")
  right.set(xlabel=SWEEPS[name], ylabel="% of the matrix-product peak", xscale="log", ylim=(0, None))
  for panel in (left, right):
    panel.set_xticks(sweep["x"], [str(value) for value in sweep["x"]])
    panel.xaxis.minorticks_off()
  left.legend()
  return plotting.rendered(figure)


def _write(directory: str, content: dict[str, Any]):
  write_json(os.path.join(directory, "benchmark.json"), content)
  with open(os.path.join(directory, "benchmark.md"), "w", encoding="utf-8") as file:
    file.write(results.markdown(content))
  for name, sweep in content["sweeps"].items():
    picture(name, sweep).save(os.path.join(directory, f"sweep_{name}.png"))


def _check_model(config: ml_collections.ConfigDict, trained: Pretrained | None):
  shape = DiT(**config.model).input_shape
  if trained and trained.model.input_shape != shape:
    raise ValueError(
      f"the trained model makes samples of shape {trained.model.input_shape}, but the config's model {shape}: "
      "give a --checkpoint of this config"
    )


def _check_options(options: ml_collections.ConfigDict):
  """Refuses values out of range; `options` is the section benchmark."""
  for name, least in LEAST.items():
    section, _, key = name.rpartition(".")
    value = options[section][key] if section else options[key]
    if value is not None:
      at_least(f"benchmark.{name}", value, least)
  if not options.read_seconds > 0:
    raise ValueError(f"benchmark.read_seconds = {options.read_seconds} must be positive: it is the time to read for")
  sweeps = options.sweeps
  for name in sweeps.over:
    one_of("benchmark.sweeps.over", name, SWEEPS)
  for name in [name for name in SWEEPS if name != "devices"]:
    if not sweeps[name] or min(sweeps[name]) < 1:
      raise ValueError(f"benchmark.sweeps.{name} = {tuple(sweeps[name])} must be numbers of at least 1: give some")
  for tokens in sweeps.tokens:
    if math.isqrt(tokens) ** 2 != tokens:
      raise ValueError(
        f"benchmark.sweeps.tokens = {tuple(sweeps.tokens)}: {tokens} is no square: give squares of the side in patches"
      )


def _check_sweeps(w: Workspace):
  """Refuses sweeps with a point that cannot be measured.

  Raises:
    ValueError: if a batch does not divide over the devices, a model cannot be built, or one does not fit the memory.
  """
  for name in w.config.benchmark.sweeps.over:
    for value, point in _points(name, w).items():
      try:
        sharding.batch_sharding(point.mesh, point.config.train.batch_size, point.config.train.grad_accum_steps)
        measure.check_training_memory(point.config, point.state_shapes, point.shardings, point.devices)
      except ValueError as error:
        raise ValueError(f"benchmark.sweeps.{name}, at {value}: {error}") from error
