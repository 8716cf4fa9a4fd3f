import logging
import time

import pytest

from eqm_jax import progress
from eqm_jax.progress import Heartbeat, Progress


@pytest.fixture
def often(monkeypatch, caplog):
  """Lines every 20 milliseconds in the place of seconds."""
  monkeypatch.setattr(progress, "INTERVAL", 0.02)
  caplog.set_level(logging.INFO, logger="eqm_jax")
  return caplog


def wait_for(condition):
  begin = time.monotonic()
  while not condition():
    assert time.monotonic() - begin < 10
    time.sleep(0.005)


def test_without_a_terminal_lines_come_even_while_one_update_takes_long(often):
  with Progress(total=40, desc="gd", unit="image") as bar:
    wait_for(lambda: "gd: 0/40 image  0:00:00 so far" in often.text)
    bar.set_postfix(nfe=107)
    bar.update(10)
    wait_for(lambda: "gd: 10/40 image" in often.text)
    bar.update(30)
  line = next(line for line in often.messages if "10/40" in line)
  assert "image/s" in line and "left" in line and line.endswith("nfe=107")
  assert "gd: 40/40 image" in often.messages[-1] and "0:00:00 left" in often.messages[-1]


def test_short_work_logs_nothing(caplog):
  caplog.set_level(logging.INFO, logger="eqm_jax")
  assert list(Progress(range(3), desc="checksums", unit="shard")) == [0, 1, 2]
  assert not caplog.messages


def test_what_is_disabled_logs_nothing(often):
  with Progress(total=2, desc="", disable=True):
    time.sleep(0.05)
  assert not often.messages


def test_work_without_a_known_end_counts(often):
  with Progress(desc="reading", unit="batch") as bar:
    bar.update()
    wait_for(lambda: often.messages)
  assert "reading: 1 batch" in often.messages[0] and "left" not in often.messages[0]


def test_a_terminal_shows_a_bar_and_no_lines(often, monkeypatch, capsys):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
  with Progress(total=2, desc="gd", unit="image") as bar:
    time.sleep(0.05)
    bar.update(2)
  assert not often.messages and "2/2" in capsys.readouterr().err


def test_work_that_cannot_be_counted_logs_its_time(often):
  with progress.waiting("reading the checkpoint"):
    wait_for(lambda: "reading the checkpoint: 0:00:00 so far" in often.text)
  count = len(often.messages)
  time.sleep(0.05)
  assert len(often.messages) == count


def test_a_heartbeat_is_silent_while_others_report_and_ends_when_closed(monkeypatch):
  monkeypatch.setattr(progress, "INTERVAL", 0.2)
  beats = []
  heartbeat = Heartbeat(lambda: beats.append(1))
  for _ in range(40):
    heartbeat.reset()
    time.sleep(0.01)
  assert not beats
  wait_for(lambda: beats)
  heartbeat.close()
  count = len(beats)
  time.sleep(0.3)
  assert len(beats) == count
