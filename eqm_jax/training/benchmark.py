"""How fast the data comes, and what training makes of it: from the cache, and encoding in each step."""

import dataclasses
import json
import logging
import os
import tempfile
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from eqm_jax.data import pipeline, sources
from eqm_jax.data.codec import Codec
from eqm_jax.data.samples import Source
from eqm_jax.files import write_json
from eqm_jax.training import train

INTERVALS = 4  # of train.log_every steps each; the first holds compilation and is left out
READ_SECONDS = 10.0
READ_BATCH = 256  # of the reader alone, whatever the config trains with

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
  """One way to feed a model."""

  name: str
  examples_per_second: float  # the median of the intervals
  data_wait: float  # the share of its time that training waits for data; 1 for a reader alone


def benchmark(config: ml_collections.ConfigDict, codec: Codec | None, directory: str) -> list[Row]:
  """Reads alone, then trains `INTERVALS`·train.log_every steps from each kind of data that the config has.

  Writes benchmark.json and benchmark.md into `directory`, made if it is not there. What is trained is thrown away.

  Args:
    config: the whole config.
    codec: of models of latents; with a section `prepare` it is also timed inside the training step.
    directory: where the files go, and for a while a checkpoint.
  """
  os.makedirs(directory, exist_ok=True)
  source = sources.open_source(config.data.source, {**config.data.options})
  rows = [_reader(config, source), _training(config, f"training from {config.data.source}", codec, directory)]
  if codec and "prepare" in config:
    online = ml_collections.ConfigDict(config.to_dict())
    online.data.source, online.data.options = config.prepare.source, config.prepare.options
    rows.append(_training(online, f"training, {config.prepare.source} encoded in each step", codec, directory))
  device = f"{jax.device_count()} × {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
  found = {"device": device, "batch_size": config.train.batch_size, "rows": [dataclasses.asdict(row) for row in rows]}
  write_json(os.path.join(directory, "benchmark.json"), found)
  with open(os.path.join(directory, "benchmark.md"), "w", encoding="utf-8") as file:
    file.write(_table(found))
  return rows


def _reader(config: ml_collections.ConfigDict, source: Source) -> Row:
  data = pipeline.batches(
    source,
    batch_size=READ_BATCH,
    seed=config.seed,
    flip=config.data.flip,
    threads=config.data.threads,
    workers=config.data.workers,
  )
  next(data)
  begin, count = time.monotonic(), 0
  while (seconds := time.monotonic() - begin) < READ_SECONDS:
    next(data)
    count += READ_BATCH
  log.info("reader alone: %.0f samples/s", count / seconds)
  return Row(f"reader alone, batches of {READ_BATCH}", count / seconds, 1.0)


def _training(config: ml_collections.ConfigDict, name: str, codec: Codec | None, directory: str) -> Row:
  config = config.copy_and_resolve_references()
  config.train.steps = INTERVALS * config.train.log_every
  config.checkpoint.every = config.train.steps
  config.optimizer.warmup_steps = 0
  with tempfile.TemporaryDirectory(dir=directory) as workdir:
    train.train(config, workdir, codec)
    with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
      timed: list[dict[str, Any]] = [json.loads(line) for line in file][2:]  # after step 1, and the first interval
  rate, wait = (float(np.median([line[key] for line in timed])) for key in ("examples_per_second", "data_wait"))
  log.info("%s: %.2f examples/s, %.1f %% of the time waiting for data", name, rate, 100 * wait)
  return Row(name, rate, wait)


def _table(found: dict[str, Any]) -> str:
  lines = [
    f"{found['device']}; batches of {found['batch_size']}",
    "",
    "| | examples/s | waiting for data |",
    "|---|---|---|",
  ]
  for row in found["rows"]:
    lines.append(f"| {row['name']} | {row['examples_per_second']:.4g} | {100 * row['data_wait']:.1f} % |")
  return "\n".join(lines) + "\n"
