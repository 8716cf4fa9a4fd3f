import json
import logging

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
