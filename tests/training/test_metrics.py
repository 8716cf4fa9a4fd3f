import dataclasses
import json
import logging

import jax
import numpy as np

from eqm_jax import hardware
from eqm_jax.training import metrics
from eqm_jax.training.metrics import MetricWriter


def steps(directory):
  return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def write(directory, first_step, values):
  writer = MetricWriter(str(directory), first_step=first_step, last_step=100, batch_size=8, flops_per_example=1000)
  for step in values:
    writer.write(step, {"loss": 1.0 / step})
  writer.close()


def test_a_resumed_run_drops_what_was_written_past_its_checkpoint(tmp_path):
  write(tmp_path, 0, [10, 20, 30])
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 40, "los')  # killed while writing
  write(tmp_path, 20, [30, 40])
  assert steps(tmp_path) == [10, 20, 30, 40]


def test_lines_tell_progress_rate_and_time_left(tmp_path, caplog):
  with caplog.at_level(logging.INFO, logger="eqm_jax"):
    write(tmp_path, 0, [10, 20])
  assert "step 20/100  loss 0.05" in caplog.text
  assert "examples_per_second" in caplog.text and "left" in caplog.text


def test_on_a_known_chip_lines_tell_its_share_of_the_peak_and_its_memory(tmp_path, monkeypatch):
  """8 samples of 1,000 operations a step: what the chip could do in the same time is known."""
  chip = dataclasses.replace(hardware.CHIPS["TPU v4"], flops=1e6)
  monkeypatch.setattr(metrics.hardware, "chip_of", lambda kind: chip)
  monkeypatch.setattr(metrics, "_memory", lambda: [{"peak_bytes_in_use": gib * 2**30} for gib in (3, 5)])
  write(tmp_path, 0, [10, 20])
  first, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
  assert "mfu" not in first, "the first interval would count compilation"
  np.testing.assert_allclose(last["mfu"], last["examples_per_second_per_device"] * 1000 / 1e6)
  np.testing.assert_allclose(last["examples_per_second_per_device"] * jax.device_count(), last["examples_per_second"])
  assert last["device_gib"] == 5


def test_other_processes_than_the_first_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.devices, "process", lambda: (1, 2))
  write(tmp_path, 0, [10, 20])
  assert not list(tmp_path.iterdir())
