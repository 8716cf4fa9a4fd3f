"""The suite: which cases a config has, in which order, and the files that hold what was measured."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from eqm_jax.benchmark import machine, measure, network_cases, pipeline_cases, results, sweeps
from eqm_jax.benchmark.network_cases import NotApplicable, Workspace
from eqm_jax.benchmark.results import Row
from eqm_jax.data.codec import Codec
from eqm_jax.files import write_json
from eqm_jax.networks.dit import DiT
from eqm_jax.training.pretrained import Pretrained

# In this order: the network first, from which the rest is understood.
CASES: dict[str, Callable[[Workspace], list[Row]]] = {
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
  "Inception features": pipeline_cases.inception_features,
  "classifier features": pipeline_cases.classifier_features,
  "metrics": pipeline_cases.metrics,
}

log = logging.getLogger(__name__)


def benchmark(
  config: ml_collections.ConfigDict,
  directory: str,
  codec: Codec | None = None,
  trained: Pretrained | None = None,
  compare: str | None = None,
  compare_any: bool = False,
) -> dict[str, Any]:
  """Measures a config on the devices of this process.

  Writes benchmark.json, benchmark.md and the pictures of the sweeps into `directory`, which is made if it does not
  exist.

  Args:
    config: the whole config; its section `benchmark` says how much is measured.
    directory: of the results.
    codec: the config's autoencoder; without it one with random weights is decoded with.
    trained: a model whose samples stop by themselves; without it the stopping times are synthetic.
    compare: an earlier benchmark.json, with which the new one is compared at the end.
    compare_any: compare also where that is of another config or machine.

  Returns:
    What benchmark.json holds.

  Raises:
    ValueError: before anything is measured, if an option is out of range, the model does not fit the memory, or
      `compare` is not comparable.
  """
  _check_options(config)
  _check_model(config, trained)
  devices = jax.local_devices()
  about = machine.describe(devices)
  old = results.read(compare) if compare else None
  if old and not compare_any:
    results.check_comparable(compare, old, about, results.comparable_config(config))
  workspace = Workspace(config, devices, directory, trained, codec)
  memory = machine.check_memory(config, workspace.state_shapes, workspace.shardings, devices)
  sweeps.check_points(workspace)
  log.info("benchmark on %s", machine.sentence(about))
  # What compiles longest, and needs most: the compiler knows better than the formula whether it fits.
  machine.refuse("the compiled training step", workspace.program_of_step.bytes, memory["available"])
  os.makedirs(directory, exist_ok=True)

  before = _peaks(config, devices)
  rows, skipped = _measured(workspace)
  after = _peaks(config, devices)  # a machine that others use may have been slow at the beginning
  peaks = {name: max(before[name], after[name], key=lambda peak: peak["flops_per_second"]) for name in before}
  content = results.document(config, about, memory, peaks, rows, skipped)
  _write(directory, content)
  log.info("%s", results.markdown(content))
  if config.benchmark.sweeps.over:
    content["sweeps"] = sweeps.measure_all(workspace, peaks)
    _write(directory, content)
  if old:
    log.info("compared with %s\n%s", compare, results.comparison(old, content))
  return content


def _measured(workspace: Workspace) -> tuple[list[Row], dict[str, str]]:
  """All rows, and why a case has none."""
  rows, skipped, begin = [], {}, time.monotonic()
  for done, (name, case) in enumerate(CASES.items(), start=1):
    try:
      with measure.peak_process_memory() as peak:
        measured = case(workspace)
    except NotApplicable as reason:
      skipped[name] = str(reason)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      skipped[name] = f"does not fit the memory: {str(error).splitlines()[0]}"
    if name in skipped:
      log.info("%s: left out, %s", name, skipped[name])
      continue
    device_bytes = measure.peak_device_memory(workspace.devices)
    for row in measured:
      process_bytes = row.process_bytes or (peak[0] if peak else None)
      row = dataclasses.replace(row, process_bytes=process_bytes, device_bytes=device_bytes)
      rows.append(row)
      log.info("%s", results.line(row))
    elapsed = time.monotonic() - begin
    left = elapsed / done * (len(CASES) - done)
    log.info("case %d of %d, %.0f s so far, about %.0f s left", done, len(CASES), elapsed, left)
  return rows, skipped


def _peaks(config: ml_collections.ConfigDict, devices: list[jax.Device]) -> dict[str, dict[str, float]]:
  """The matrix-product peak of every precision that a case of the config computes in."""
  precisions = ["float32", config.model.dtype]
  if config.autoencoder.path:
    precisions.append(config.autoencoder.dtype)
  if set(config.evaluation.features) & {"inception", "classifier"}:
    precisions.append("float32 exact")
  peaks = {}
  for precision in dict.fromkeys(precisions):
    if precision == "float32 exact" and devices[0].platform == "cpu":
      peaks[precision] = peaks["float32"]  # a CPU never rounds the factors
    else:
      peaks[precision] = measure.product_peak(precision, devices, config.benchmark.turns)
    rate, side = peaks[precision]["flops_per_second"], peaks[precision]["side"]
    log.info("matrix products, %s: %.4g GFLOP/s at %d × %d", precision, rate / 1e9, side, side)
  return peaks


def _write(directory: str, content: dict[str, Any]):
  write_json(os.path.join(directory, "benchmark.json"), content)
  with open(os.path.join(directory, "benchmark.md"), "w", encoding="utf-8") as file:
    file.write(results.markdown(content))
  for name, sweep in content["sweeps"].items():
    sweeps.picture(name, sweep).save(os.path.join(directory, f"sweep_{name}.png"))


def _check_model(config: ml_collections.ConfigDict, trained: Pretrained | None):
  shape = DiT(**config.model).input_shape
  if trained and trained.model.input_shape != shape:
    raise ValueError(
      f"the trained model makes samples of shape {trained.model.input_shape}, but the config's model {shape}: "
      "give a --checkpoint of this config"
    )


def _check_options(config: ml_collections.ConfigDict):
  options = config.benchmark
  least = {
    "turns": (options.turns, 1),
    "batch_size": (options.batch_size, 1),
    "nfe": (options.nfe, 1),
    "samples": (options.samples, 1),
    "steps": (options.steps, 0),
    "metrics.samples": (options.metrics.samples, 0),
    "metrics.real": (options.metrics.real, 10),
    "metrics.size": (options.metrics.size, 1),
  }
  for name, (value, smallest) in least.items():
    if value is not None and value < smallest:
      raise ValueError(f"benchmark.{name} = {value} must be at least {smallest}")
  if not options.read_seconds > 0:
    raise ValueError(f"benchmark.read_seconds = {options.read_seconds} must be positive")
  sweeps.check_options(options.sweeps)
