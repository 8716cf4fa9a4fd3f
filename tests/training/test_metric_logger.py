import dataclasses
import json
import logging
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqm_jax import hardware, progress
from eqm_jax.training import metric_logger
from eqm_jax.training.metric_logger import MetricLogger


def steps(directory):
  return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def open_logger(directory, **options):
  options = dict(first_step=0, last_step=100, batch_size=8, log_every=10, flops_per_example=1000) | options
  return MetricLogger(str(directory), **options)


def write(directory, first_step, values):
  logger = open_logger(directory, first_step=first_step)
  for step in values:
    logger.write(step, {"loss": 1.0 / step})
  logger.close()


def test_a_resumed_run_drops_what_was_written_past_its_checkpoint(tmp_path):
  write(tmp_path, 0, [10, 20, 30])
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 40, "los')  # killed while writing
  write(tmp_path, 20, [30, 40])
  assert steps(tmp_path) == [10, 20, 30, 40]


def test_lines_have_progress_rate_and_time_left(tmp_path, caplog):
  with caplog.at_level(logging.INFO, logger="eqm_jax"):
    write(tmp_path, 0, [10, 20])
  assert "step 20/100  loss 0.05" in caplog.text
  assert "examples_per_second" in caplog.text and "left" in caplog.text


def test_on_a_known_chip_lines_have_its_utilization_and_its_memory(tmp_path, monkeypatch):
  """8 samples of 1,000 operations a step: the peak rate of the chip is known."""
  chip = dataclasses.replace(hardware.CHIPS["TPU v4"], flops=1e6)
  monkeypatch.setattr(metric_logger.hardware, "chip_of", lambda kind: chip)
  monkeypatch.setattr(metric_logger, "_memory_stats", lambda: [{"peak_bytes_in_use": gib * 2**30} for gib in (3, 5)])
  write(tmp_path, 0, [10, 20])
  first, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
  assert "mfu" not in first, "the first interval would count compilation"
  np.testing.assert_allclose(last["mfu"], last["examples_per_second_per_device"] * 1000 / 1e6)
  np.testing.assert_allclose(last["examples_per_second_per_device"] * jax.device_count(), last["examples_per_second"])
  assert last["device_gib"] == 5


def test_other_processes_than_the_first_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metric_logger.distributed, "process_index_and_count", lambda: (1, 2))
  write(tmp_path, 0, [10, 20])
  assert not list(tmp_path.iterdir())


def metrics_of(loss: float, **more: float):
  return {"loss": jnp.asarray(loss), "parameter_norm": jnp.asarray(1.0), "learning_rate": jnp.asarray(0.1), **more}


def test_metrics_are_fetched_a_step_late_and_by_a_flush(tmp_path):
  logger = open_logger(tmp_path, log_every=1, last_step=4, loss_scale=2.0)
  logger.log_previous(1, metrics_of(4.0))
  assert not steps(tmp_path)
  logger.log_previous(2, metrics_of(3.0))
  assert steps(tmp_path) == [1]
  logger.flush()
  assert steps(tmp_path) == [1, 2]
  logger.flush()
  logger.log_previous(3, metrics_of(1.0))
  assert steps(tmp_path) == [1, 2]
  logger.close()
  first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
  assert first["loss"] == 4 and first["relative_loss"] == 2


def test_a_step_that_is_not_finite_stops_the_run_unless_its_batch_is_skipped(tmp_path, caplog):
  logger = open_logger(tmp_path, log_every=1, skipped_batches=1, newest_checkpoint=lambda: 7)
  logger.log_previous(8, metrics_of(np.nan, skipped_batches=2))
  logger.log_previous(9, metrics_of(np.nan, skipped_batches=2))
  assert re.search("step 8: .*loss = nan.*; this batch is skipped", caplog.text)
  with pytest.raises(
    FloatingPointError, match="step 9: .*loss = nan.*stopped. The newest checkpoint is that of step 7"
  ):
    logger.flush()
  logger.close()
  assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_long_silence_is_broken_by_a_line_of_progress(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(progress, "INTERVAL", 0.02)
  caplog.set_level(logging.INFO, logger="eqm_jax")

  def wait_for(text):
    begin = time.monotonic()
    while not re.search(text, caplog.text):
      assert time.monotonic() - begin < 10, caplog.text
      time.sleep(0.005)

  logger = open_logger(tmp_path, log_every=50)
  wait_for("first step: 0:00:00 so far, compilation included")
  logger.log_previous(2, metrics_of(1.0))
  logger.log_previous(3, metrics_of(1.0))
  wait_for(r"step 2/100\n")
  logger.flush()
  wait_for(r"step 3/100  \S+ images/s  \S+ left")
  with logger.excluded_from_timing():
    time.sleep(0.05)
    caplog.clear()
    time.sleep(0.1)
    assert not caplog.messages, "what runs inside reports its own progress"
  logger.close()
  assert not steps(tmp_path), "the lines of progress are no records"
