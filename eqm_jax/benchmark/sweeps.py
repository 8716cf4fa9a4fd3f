"""Sweeps: what a step and an evaluation cost against batch, tokens, depth, samples and devices."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from PIL import Image

from eqm_jax.benchmark import machine, network_cases
from eqm_jax.benchmark.network_cases import Workspace
from eqm_jax.benchmark.results import Row
from eqm_jax.evaluation import pictures
from eqm_jax.training import sharding

NAMES = ("batch", "tokens", "depth", "samples", "devices")
LABELS = {
  "batch": "samples in a batch",
  "tokens": "tokens of a sample",
  "depth": "blocks",
  "samples": "samples drawn",
  "devices": "devices, the same samples in all",
}

log = logging.getLogger(__name__)


def check_options(options: ml_collections.ConfigDict):
  """Refuses sweeps whose points make no sense; `options` is the section benchmark.sweeps.

  Raises:
    ValueError: naming the key and the value.
  """
  for name in options.over:
    if name not in NAMES:
      raise ValueError(f"benchmark.sweeps.over names {name!r}: choose some of {', '.join(NAMES)}")
  for name in NAMES[:-1]:
    values = options[name]
    if not values or min(values) < 1:
      raise ValueError(f"benchmark.sweeps.{name} = {tuple(values)}: give numbers of at least 1")
  for tokens in options.tokens:
    if math.isqrt(tokens) ** 2 != tokens:
      raise ValueError(f"benchmark.sweeps.tokens = {tuple(options.tokens)}: {tokens} is no square of a side in patches")


def check_points(w: Workspace):
  """Refuses sweeps with a point that cannot be measured.

  Raises:
    ValueError: if a batch does not divide over the devices, a model cannot be built, or one does not fit the memory.
  """
  for name in w.config.benchmark.sweeps.over:
    for value, point in _points(name, w).items():
      try:
        sharding.batch_sharding(point.mesh, point.config.train.batch_size, point.config.train.accumulate)
        machine.check_memory(point.config, point.state_shapes, point.shardings, point.devices)
      except ValueError as error:
        raise ValueError(f"benchmark.sweeps.{name}, at {value}: {error}") from error


def measure_all(w: Workspace, peaks: dict[str, dict[str, float]]) -> dict[str, Any]:
  """The sweeps that the config asks for: {name: {"x": values, "series": {case: {"seconds", "fraction_of_peak"}}}}.

  Seconds are those of one sample.
  """
  return {name: _sweep(name, _points(name, w), peaks) for name in w.config.benchmark.sweeps.over}


def _points(name: str, w: Workspace) -> dict[int, Workspace]:
  """A workspace for every point of a sweep."""
  if name == "devices":
    counts = [2**k for k in range(len(w.devices).bit_length()) if 2**k <= len(w.devices)]
    return {count: _with_devices(w, count) for count in counts}
  changes: dict[str, Callable[[int], dict[str, int]]] = {
    "batch": lambda size: {"train.batch_size": size, "benchmark.batch_size": size, "train.accumulate": 1},
    "tokens": lambda tokens: {"model.input_size": math.isqrt(tokens) * w.config.model.patch_size},
    "depth": lambda depth: {"model.depth": depth},
    "samples": lambda samples: {"benchmark.samples": samples},
  }
  return {value: _changed(w, changes[name](value)) for value in w.config.benchmark.sweeps[name]}


def _changed(w: Workspace, changes: dict[str, int]) -> Workspace:
  config = w.config.copy_and_resolve_references()
  config.benchmark.batch_size = w.batch_size  # a number, where the config says None
  config.update_from_flattened_dict(changes)
  return dataclasses.replace(w, config=config)


def _with_devices(w: Workspace, count: int) -> Workspace:
  """Data parallelism over the first devices; all samples together stay as many as on one device."""
  changes = {"mesh.data": count, "mesh.fsdp": 1, "mesh.tensor": 1}
  changes["benchmark.batch_size"] = max(1, w.batch_size // count)
  return dataclasses.replace(_changed(w, changes), devices=w.devices[:count])


def _sweep(name: str, points: dict[int, Workspace], peaks: dict[str, dict[str, float]]) -> dict[str, Any]:
  series: dict[str, dict[str, list[float]]] = {}
  for value, w in points.items():
    for row in _rows(name, w):
      line = series.setdefault(row.name, {"seconds": [], "fraction_of_peak": []})
      line["seconds"].append(row.seconds / row.images)
      line["fraction_of_peak"].append(row.flops / row.seconds / _peak(w, peaks[row.precision]["flops_per_second"]))
    log.info("sweep over %s: %d done", name, value)
  return {"x": list(points), "series": series}


def _rows(name: str, w: Workspace) -> list[Row]:
  cases = [network_cases.training_step, network_cases.evaluation, network_cases.guided_evaluation]
  rows = []
  for case in [network_cases.batching] if name == "samples" else cases:
    with contextlib.suppress(network_cases.NotApplicable):
      rows += case(w)
  return rows


def _peak(w: Workspace, of_all_devices: float) -> float:
  """The peak of a workspace's devices. Forced devices of a CPU share its cores: any number of them reaches it all."""
  return of_all_devices * (1 if w.devices[0].platform == "cpu" else len(w.devices) / jax.local_device_count())


def picture(name: str, sweep: dict[str, Any]) -> Image.Image:
  """Seconds of a sample, and the fraction of the peak, against what the sweep is over."""
  drawn, (left, right) = pictures.figure(9, 3.4, columns=2)
  for case, line in sweep["series"].items():
    left.plot(sweep["x"], [1e3 * seconds for seconds in line["seconds"]], marker="o", markersize=4, label=case)
    right.plot(sweep["x"], [100 * share for share in line["fraction_of_peak"]], marker="o", markersize=4, label=case)
  left.set(xlabel=LABELS[name], ylabel="ms of one sample", xscale="log", yscale="log")
  right.set(xlabel=LABELS[name], ylabel="% of the matrix-product peak", xscale="log", ylim=(0, None))
  for panel in (left, right):
    panel.set_xticks(sweep["x"], [str(value) for value in sweep["x"]])
    panel.minorticks_off()
  left.legend()
  return pictures.rendered(drawn)
