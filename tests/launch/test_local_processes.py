"""launch/local.sh: pretended devices and real processes of this machine."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from launching import FLAGS, LAUNCH, call, environment, recording_python, records, wait_until


@pytest.fixture
def recorder(tmp_path):
  return recording_python(tmp_path)


def local(tmp_path, *words, acts=None, **more) -> subprocess.Popen:
  env = environment(tmp_path, RECORDS=tmp_path / "records", ACTS=json.dumps(acts or {}), XLA_FLAGS="--xla_dump_to=/x y")
  env["PYTHON"] = str(tmp_path / "bin" / "python")
  command = ["bash", LAUNCH / "local.sh", *words, *FLAGS]
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def check_local_records(found: dict[str, dict], processes: int, devices: int):
  assert set(found) == {str(i) for i in range(processes)}
  ports = set()
  for i, record in found.items():
    expected = ["-m", "eqm_jax.main", *FLAGS]
    if processes > 1:
      ports.add(record["arguments"][len(expected)])
      expected += [record["arguments"][len(expected)], f"--num_processes={processes}", f"--process_id={i}"]
    assert record["arguments"] == expected
    assert record["xla_flags"] == f"--xla_force_host_platform_device_count={devices} --xla_dump_to=/x y"
  assert all(re.fullmatch(r"--coordinator_address=localhost:\d+", port) for port in ports)
  assert len(ports) == (processes > 1)


@pytest.mark.parametrize("processes, devices", [(1, 1), (1, 8), (3, 2)])
def test_local_processes_get_their_flags_and_a_dry_run_prints_the_same(tmp_path, recorder, processes, devices):
  words = [f"--processes={processes}", f"--devices={devices}"]
  process = local(tmp_path, *words)
  _, stderr = process.communicate(timeout=30)
  assert process.returncode == 0, stderr
  check_local_records(records(tmp_path), processes, devices)
  expected = {f"{f'[{i}] ' if i else ''}process {i} is here" for i in range(processes)}
  assert set(stderr.splitlines()) == expected
  shutil.rmtree(tmp_path / "records")
  (tmp_path / "records").mkdir()
  printed, _ = local(tmp_path, "--dry-run", *words).communicate(timeout=30)
  assert not records(tmp_path)
  call("bash", "-c", printed, env=environment(tmp_path, RECORDS=tmp_path / "records"))
  check_local_records(records(tmp_path), processes, devices)


@pytest.mark.parametrize("other", ["wait", "stubborn"])
def test_local_processes_that_are_left_behind_are_stopped(tmp_path, recorder, other):
  begin = time.monotonic()
  process = local(tmp_path, "--processes=2", "--grace=1", acts={"0": other, "1": "fail"})
  _, stderr = process.communicate(timeout=30)
  assert process.returncode == 7, stderr
  assert 0.9 < time.monotonic() - begin < 20, "the other one was not given its time"
  assert (tmp_path / "records" / "0.told").read_text() == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_signals_reach_all_local_processes(tmp_path, recorder, number, processes):
  process = local(tmp_path, f"--processes={processes}", acts={"0": "wait", "1": "wait"})
  wait_until(lambda: len(records(tmp_path)) == processes, "the processes")
  process.send_signal(number)
  _, stderr = process.communicate(timeout=30)
  assert process.returncode == 0, stderr
  for i in range(processes):
    assert (tmp_path / "records" / f"{i}.told").read_text() == number.name


TINY = [
  "--config=configs/digits.py:smoke", "--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2",
  "--config.train.steps=4", "--config.train.batch_size=8", "--config.optimizer.warmup_steps=1",
  "--config.evaluation.num_samples=None", "--config.mesh.dcn_data=2",  # each half of the devices plays a slice
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words, devices", [(["--processes=2"], "2 × cpu in 2"), (["--devices=2"], "2 × cpu in 1")])
def test_local_training(tmp_path, words, devices):
  env = environment(tmp_path, PYTHON=sys.executable)
  finished = call("bash", LAUNCH / "local.sh", *words, *TINY, f"--workdir={tmp_path / 'run'}", env=env, cwd=ROOT)
  assert finished.returncode == 0, finished.stderr
  assert f"devices: {devices}" in finished.stderr
  steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert steps == [1, 4]
