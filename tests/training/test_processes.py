"""Runs of several real processes of one machine, which connect on one of its ports."""

import json
import pathlib
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from conftest import ended, free_port, load_config, start_python

from eqm_jax import distributed, modes
from eqm_jax.checkpoints import manager as checkpoint_manager
from eqm_jax.checkpoints import pretrained
from eqm_jax.io import workdir_lock
from eqm_jax.training import train

RUN = {
  "model.width": 16, "model.depth": 1, "model.num_heads": 2, "train.batch_size": 8, "train.log_every": 1,
  "checkpoint.every": 5, "evaluation.num_samples": None,
}  # fmt: skip


def start(workdir, count: int, devices: int = 1, **changes) -> list[subprocess.Popen]:
  """The processes of one run."""
  flags = [f"--config.{name}={value}" for name, value in (RUN | changes).items()]
  arguments = ["--config=configs/digits.py:smoke", f"--workdir={workdir}", *flags]
  return start_python("-m", "eqm_jax.main", *arguments, processes=count, devices=devices)


def stderr_of(finished: list[subprocess.CompletedProcess]) -> list[str]:
  return [one.stderr for one in finished]


def wait_for_step(processes: list[subprocess.Popen], workdir: pathlib.Path, step: int, timeout: float = 200):
  begin, metrics = time.monotonic(), workdir / "metrics.jsonl"
  while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
    assert all(process.poll() is None for process in processes), "ended early"
    assert time.monotonic() - begin < timeout, "no step came"
    time.sleep(0.02)


LONG = {"train.steps": 500, "optimizer.warmup_steps": 1, "optimizer.schedule": "constant"}


def preempted(workdir, count: int, since: int = 0, **mesh: int) -> int:
  """Runs `count` processes of two devices, of which the last is sent SIGTERM; the step that they saved."""
  running = start(workdir, count, 2, **LONG, **{f"mesh.{axis}": size for axis, size in mesh.items()})
  wait_for_step(running, workdir, since + 7)
  running[-1].send_signal(signal.SIGTERM)
  output = stderr_of(ended(running))
  saved = checkpoint_manager.steps(str(workdir))[-1]
  assert f"SIGTERM: saved step {saved}" in output[0] and since < saved < LONG["train.steps"]
  # Only the first process tells and writes.
  assert f"step {since + 1}/" in output[0] and not any(f"step {since + 1}/" in other for other in output[1:])
  # Every process wrote its part of the checkpoint.
  assert len(list((workdir / "checkpoints" / str(saved) / "state").glob("ocdbt.process_*"))) == count
  return saved


def check_against_one_process(workdir, tmp_path, saved: int, monkeypatch):
  """Ends the run in this process, and compares it with one that never knew another."""
  monkeypatch.setattr(train.validation, "check_same_run", lambda *_: None)  # it would refuse the shorter run
  config = load_config("digits", "smoke")
  config.update_from_flattened_dict(RUN | LONG | {"train.steps": saved + 10})
  records = []
  for directory in (workdir, tmp_path / "one"):
    assert train.train(config, str(directory))
    records.append([json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()])
    assert [record["step"] for record in records[-1]] == list(range(1, saved + 11))
  np.testing.assert_allclose(*([record["loss"] for record in one] for one in records), rtol=1e-3)
  ours, theirs = (pretrained.load(directory).params for directory in (workdir, tmp_path / "one"))
  for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    np.testing.assert_allclose(leaf, other, atol=2e-3)


@pytest.mark.slow
def test_two_processes_are_preempted_and_one_goes_on_on_another_mesh(tmp_path, monkeypatch):
  saved = preempted(tmp_path / "two", 2, dcn_data=2, data=1, fsdp=2)  # each process plays a slice
  check_against_one_process(tmp_path / "two", tmp_path, saved, monkeypatch)


@pytest.mark.slow
def test_four_processes_then_two_then_one(tmp_path, monkeypatch):
  workdir = tmp_path / "four"
  saved = preempted(workdir, 4, data=2, fsdp=4)
  saved = preempted(workdir, 2, since=saved, data=1, fsdp=2, tensor=2)
  check_against_one_process(workdir, tmp_path, saved, monkeypatch)


# Goes on with a run; the second process cannot read its part of the newest checkpoint.
UNREADABLE = """
import sys
from conftest import connection, load_config
from eqm_jax import distributed
from eqm_jax.checkpoints import manager as checkpoint_manager
from eqm_jax.training import train

with distributed.initialized(*connection()):
  read = checkpoint_manager._read

  def failing(directory, shapes):
    if directory.endswith("/10") and distributed.process_index_and_count()[0] == 1:
      raise checkpoint_manager.DamagedCheckpoint(f"{directory}: damaged checkpoint (for a test)")
    return read(directory, shapes)

  checkpoint_manager._read = failing
  config = load_config("digits", "smoke")
  config.update_from_flattened_dict(eval(sys.argv[2]))
  assert train.train(config, sys.argv[1])
"""


@pytest.mark.slow
def test_what_one_process_cannot_read_no_process_uses(tmp_path, monkeypatch):
  changes = RUN | LONG | {"train.steps": 10}
  config = load_config("digits", "smoke")
  config.update_from_flattened_dict(changes)
  assert train.train(config, str(tmp_path / "run"))
  changes |= {"mesh.data": 1, "mesh.fsdp": -1}
  output = stderr_of(ended(start_python("-c", UNREADABLE, tmp_path / "run", changes, processes=2)))
  assert "damaged checkpoint, as another process finds" in output[0] and "(for a test)" in output[1]
  assert (tmp_path / "run" / checkpoint_manager.DAMAGED / "10").is_dir()
  steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert steps == list(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_when_a_process_dies_the_others_stop_with_a_message(tmp_path, killed):
  running = start(tmp_path, 2, **LONG, **{"mesh.data": 2})
  wait_for_step(running, tmp_path, 3)
  running[killed].kill()
  survivor = ended(running, status=None)[1 - killed]
  assert survivor.returncode != 0
  assert "one of them ended" in survivor.stderr or "JAX distributed service" in survivor.stderr, survivor.stderr


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path):
  """Only the first locks the workdir; to the others its end looks like a death."""
  with workdir_lock(str(tmp_path)):
    finished = ended(start(tmp_path, 2, **LONG, **{"mesh.data": 2}), status=None)
  assert all(one.returncode for one in finished)
  output = stderr_of(finished)
  assert "another run is at work here" in output[0], output
  assert "one of them ended" in output[1] or "JAX distributed service" in output[1], output


# Reads three epochs; checks every row of this process's devices, and records which samples it read.
SHARDS = """
import functools, json, sys
import jax, numpy as np
from conftest import connection
from jax.sharding import AxisType
from eqm_jax import distributed
from eqm_jax.data import pipeline
from eqm_jax.data.samples import Source
from eqm_jax.training import sharding

read = []

class Numbered(Source):
  num_classes, shape, autoencoder = 24, (1, 1, 1), None

  def __len__(self):
    return 24

  def __getitem__(self, index):
    read.append(int(index))
    return {"image": np.full((1, 1, 1), index, np.float32), "label": np.int32(index)}

with distributed.initialized(*connection()):
  sizes, order = json.loads(sys.argv[2])
  mesh = sharding.make_mesh(*sizes[:3], dcn_data=sizes[3])
  if order:  # of devices, which depends on the machine
    lie = np.asarray(jax.devices())[np.asarray(order)].reshape(mesh.devices.shape)
    mesh = jax.sharding.Mesh(lie, mesh.axis_names, axis_types=mesh.axis_types)
  placed = sharding.batch_sharding(mesh, 8)
  rows = sharding.local_rows(placed, 8)
  place = functools.partial(jax.tree.map, functools.partial(sharding.global_array, placed, 8, rows))
  options = dict(batch_size=8, seed=0, flip=False, threads=1)
  expected = pipeline.batches(Numbered(), **options)
  expected = [next(expected) for _ in range(9)]
  read.clear()
  data = pipeline.batches(Numbered(), **options, rows=rows, place=place)
  for whole in expected:
    batch = next(data)
    for name in batch:
      for shard in batch[name].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[name][shard.index])
  seen = [int(label) for whole in expected for label in whole["label"][rows]]
  assert set(seen) <= set(read)
  process, processes = distributed.process_index_and_count()
  json.dump({"seen": seen, "processes": processes}, open(f"{sys.argv[1]}/{process}.json", "w"))
"""


def read_shards(tmp_path, running: list[subprocess.Popen]) -> list[list[int]]:
  """The samples that each process had of 9 batches of 8, three epochs of 24."""
  ended(running)
  found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(len(running))]
  assert {one["processes"] for one in found} == {len(running)}
  return [one["seen"] for one in found]


def check_epochs(seen: list[list[int]], copies: int = 1):
  """Every sample once an epoch: no two processes read the same (with `copies`, as many do), and none is left out."""
  share = len(seen[0]) // 3
  for epoch in range(3):
    of_all = sum((one[epoch * share : (epoch + 1) * share] for one in seen), [])
    assert sorted(of_all) == sorted(list(range(24)) * copies)


@pytest.mark.parametrize(
  "count, local, mesh, copies",
  [
    pytest.param(2, 2, ((-1, 1, 1, 2), [0, 2, 1, 3]), 1, id="two, interleaved"),
    pytest.param(2, 1, ((1, 1, 2, 1), []), 2, id="two, tensor across them", marks=pytest.mark.slow),
    pytest.param(2, 1, ((-1, 1, 1, 1), []), 1, id="two", marks=pytest.mark.slow),
    pytest.param(4, 1, ((-1, 2, 1, 2), []), 1, id="four, two a slice", marks=pytest.mark.slow),
    pytest.param(4, 1, ((2, 2, 1, 1), [3, 0, 2, 1]), 1, id="four, in disorder", marks=pytest.mark.slow),
    pytest.param(
      4, 2, ((2, 1, 4, 1), [0, 4, 1, 5, 2, 6, 3, 7]), 2, id="four, tensor across them", marks=pytest.mark.slow
    ),
  ],
)
def test_processes_share_the_data(tmp_path, count, local, mesh, copies):
  running = start_python("-c", SHARDS, tmp_path, json.dumps(mesh), processes=count, devices=local)
  seen = read_shards(tmp_path, running)
  if local == 1 or copies == 1:
    check_epochs(seen, copies)


@pytest.mark.slow
def test_processes_find_each_other_by_slurm(tmp_path):
  job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2"}
  running = []
  for i in range(2):
    task = dict(**job, SLURM_NTASKS="2", SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
    running += start_python("-c", SHARDS, tmp_path, json.dumps(((-1, 1, 1, 1), [])), **task)
  check_epochs(read_shards(tmp_path, running))


# Raises in one process, while the other waits in a collective.
RAISES = """
import sys
from conftest import connection
from eqm_jax import distributed

with distributed.initialized(*connection()):
  distributed.wait_for_all("begin")
  if distributed.process_index_and_count()[0] == 1:
    raise eval(sys.argv[1])
  distributed.wait_for_all("end")
"""


@pytest.mark.parametrize(
  "error, status",
  [("KeyboardInterrupt()", 130), pytest.param("ValueError('mine')", 1, marks=pytest.mark.slow)],
)
def test_whatever_ends_a_process_ends_the_others(error, status):
  other, raising = ended(start_python("-c", RAISES, error, processes=2), status=None, timeout=60)
  assert raising.returncode == status and other.returncode != 0
  assert "one of them ended" in other.stderr or "JAX distributed service" in other.stderr, other.stderr


@pytest.mark.parametrize(
  "text, lost",
  [
    ("UNAVAILABLE: Task 1 is gone", True),
    ("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:25813", True),
    ("DEADLINE_EXCEEDED: Barrier timed out", True),
    ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes", False),
    ("INVALID_ARGUMENT: no such thing", False),
    ("NOT_FOUND: Error opening zarr driver", False),
  ],
)
def test_what_tells_of_a_lost_process(text, lost):
  assert distributed.is_lost_process(ValueError(text)) == lost


def test_modes_of_one_process_are_refused_in_several(monkeypatch, tmp_path):
  monkeypatch.setattr(distributed, "process_index_and_count", lambda: (0, 2))
  with pytest.raises(ValueError, match="--mode=sample runs in one process, not in 2"):
    modes.run("sample", load_config("digits", "smoke"), str(tmp_path))


def test_numbers_that_differ_between_processes_are_refused(monkeypatch):
  distributed.check_same("the step", 4)
  monkeypatch.setattr(distributed, "from_all", lambda array: np.stack([array, array + 5]))
  with pytest.raises(ValueError, match=r"the step is not the same in all processes, but \[4, 9\]"):
    distributed.check_same("the step", 4)


@pytest.mark.slow
def test_two_processes_start_from_the_weights_of_another_run(tmp_path):
  for count, changes in ((1, {}), (2, {"train.init_from": str(tmp_path / "1"), "mesh.fsdp": 2})):
    finished = ended(start(tmp_path / str(count), count, **{**LONG, "train.steps": 3, **changes}))
  assert f"started from the weights of {tmp_path / '1'}" in finished[0].stderr


@pytest.mark.parametrize(
  "arguments, text",
  [
    (("localhost:1", None, 0), "--num_processes not given"),
    ((None, 2, None), "--coordinator_address and --process_id not given"),
    (("localhost:1", 2, 2), "--process_id=2: give HOST:PORT, and process_id from 0 to num_processes − 1"),
    (("localhost", 2, 0), "--coordinator_address=localhost .*give HOST:PORT"),
  ],
)
def test_processes_that_cannot_be_are_refused(arguments, text):
  with pytest.raises(ValueError, match=text), distributed.initialized(*arguments):
    pass
