"""Faults: kills, full and damaged disks, gradients that are not finite, two runs in one workdir."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, final_state, load_config

from eqm_jax.checkpoints import manager as checkpoint_manager
from eqm_jax.checkpoints import pretrained
from eqm_jax.data import sources
from eqm_jax.io import workdir_lock
from eqm_jax.networks import dit
from eqm_jax.training import profiler, train

# One run, as a config and as the flags that make the same config in another process.
RUN = {
  "model.width": 16, "model.depth": 2, "model.num_heads": 2, "train.steps": 400, "train.batch_size": 8,
  "train.log_every": 5, "checkpoint.every": 20, "evaluation.num_samples": None,
}  # fmt: skip


def config_of(**changes):
  config = load_config("digits", "smoke")
  config.update_from_flattened_dict(RUN | changes)
  return config


class Run:
  """A run in a process of its own, whose lines are kept."""

  def __init__(self, workdir: pathlib.Path, **changes):
    flags = [f"--config.{name}={value}" for name, value in (RUN | changes).items()]
    command = [sys.executable, "-m", "eqm_jax.main", "--config=configs/digits.py:smoke", f"--workdir={workdir}", *flags]
    self.workdir, self.lines = workdir, []
    self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    self._reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stderr.readline, "")))
    self._reader.start()

  def wait_for(self, condition, timeout: float = 300):
    """Returns when `condition` holds or the run has ended."""
    begin = time.monotonic()
    while not condition() and self.process.poll() is None:
      assert time.monotonic() - begin < timeout, "".join(self.lines)
      time.sleep(0.001)

  def logs(self, text: str):
    return lambda: any(text in line for line in list(self.lines))

  def saves(self):
    """Holds while a checkpoint is being written."""
    directory = self.workdir / "checkpoints"
    before = {path.name for path in directory.iterdir()} if directory.is_dir() else set()

    def begun():
      return directory.is_dir() and any("tmp" in p.name and p.name not in before for p in directory.iterdir())

    return begun

  def end(self, signal_number: int | None = None) -> int:
    """The exit status, after sending a signal if one is given."""
    if signal_number is not None:
      self.process.send_signal(signal_number)
    self.process.wait(timeout=300)
    self._reader.join()
    return self.process.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  assert train.train(config_of(), str(workdir))
  return workdir


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [(record["step"], record["loss"]) for record in records]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(uninterrupted, tmp_path, kills):
  """Aimed at while it trains, saves and resumes; of the moments only the distribution is fixed."""
  chance, aimed = random.Random(kills), {"training": 0, "saving": 0, "resuming": 0}
  resumed = 0
  for kill in range(kills):
    moment = ("training", "saving", "resuming")[kill % 3]
    run = Run(tmp_path)
    begins_saving = run.saves()
    if moment == "resuming":
      run.wait_for(run.logs("sharding, and"))  # the last line before the checkpoint is read
    elif moment == "saving":
      run.wait_for(begins_saving)
    else:
      run.wait_for(lambda run=run: run.logs("loss")() and checkpoint_manager.steps(str(tmp_path)))
    time.sleep(chance.uniform(0, {"training": 0.3, "saving": 0.05, "resuming": 1.5}[moment]))
    assert run.end(signal.SIGKILL) == -signal.SIGKILL, f"the run ended before kill {kill}: {''.join(run.lines)}"
    aimed[moment] += 1
    resumed += run.logs("resumed from")()
    assert not run.logs("damaged")(), "a kill leaves no half a checkpoint"
  steps = checkpoint_manager.steps(str(tmp_path))
  assert steps and steps[-1] < RUN["train.steps"]
  assert train.train(config_of(), str(tmp_path))
  same = final_state(tmp_path) == final_state(uninterrupted)
  print(
    f"\n{kills} kills (aimed at {aimed}), {resumed + 1} resumes, the last from step {steps[-1]}; bits equal: {same}"
  )
  assert same and losses(tmp_path) == losses(uninterrupted)


def test_sigterm_saves_and_exits_zero(uninterrupted, tmp_path):
  run = Run(tmp_path)
  run.wait_for(run.logs("loss"))
  assert run.end(signal.SIGTERM) == 0, "".join(run.lines)
  step = checkpoint_manager.steps(str(tmp_path))[-1]
  assert run.logs(f"SIGTERM: saved step {step}")() and step < RUN["train.steps"]
  assert train.train(config_of(), str(tmp_path))
  assert final_state(tmp_path) == final_state(uninterrupted)


# ---------------------------------------------------------------- disks


def truncate(directory: pathlib.Path):
  for path in (directory / "state" / "d").iterdir():
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_saved_bit(directory: pathlib.Path):
  """As if a memory or a network had changed the arrays, where no file format notices."""
  path = next((directory / "checksums").iterdir())
  saved = json.loads(path.read_text())
  saved["ema_params/blocks/qkv/kernel"] ^= 1 << 7
  path.write_text(json.dumps(saved))


def lose_metadata(directory: pathlib.Path):
  (directory / "state" / "_METADATA").unlink()


def lose_position(directory: pathlib.Path):
  for path in (directory / "data").iterdir():
    path.write_text("{")


SLOWER = [pytest.param(damage, marks=pytest.mark.slow) for damage in (truncate, lose_metadata, lose_position)]


@pytest.mark.parametrize("damage", [flip_a_saved_bit, *SLOWER])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(uninterrupted, tmp_path, caplog, damage):
  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  damage(workdir / "checkpoints" / "400")
  if damage is not lose_position:  # which a reader of parameters does not need
    assert pretrained.load(workdir).step == 380
    assert "checkpoints/400: damaged checkpoint" in caplog.text
  caplog.clear()
  assert train.train(config_of(), str(workdir))
  assert "checkpoints/400: damaged checkpoint" in caplog.text
  assert (workdir / checkpoint_manager.DAMAGED / "400").is_dir() and checkpoint_manager.steps(str(workdir)) == [
    380,
    400,
  ]
  assert final_state(workdir) == final_state(uninterrupted), "the steps after 380 were taken again"


def test_what_a_killed_save_leaves_and_other_litter_confuse_nobody(uninterrupted, tmp_path, caplog):
  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  saved = workdir / "checkpoints"
  for name in ("420.orbax-checkpoint-tmp", "440.orbax-checkpoint-tmp-123", "460.partial", ".ipynb_checkpoints", "copy"):
    shutil.copytree(saved / "400", saved / name)
  (saved / ".DS_Store").write_text("")
  assert checkpoint_manager.steps(str(workdir)) == [380, 400] and pretrained.load(workdir).step == 400
  (workdir / "config.json.partial").write_text("{")
  assert train.train(config_of(), str(workdir))
  assert "damaged" not in caplog.text and final_state(workdir) == final_state(uninterrupted)
  assert not list(saved.glob("*orbax-checkpoint-tmp*")) and not (workdir / "config.json.partial").exists()


def test_any_flipped_bit_is_noticed_or_harmless(uninterrupted, tmp_path, caplog):
  """Bits anywhere in the newest checkpoint's files."""
  chance, outcomes = random.Random(0), {"noticed": 0, "harmless": 0}
  shapes = dit.parameter_shapes(dit.DiT(**config_of().model))
  whole, step = checkpoint_manager.restore_params(str(uninterrupted), "ema_params", shapes)
  newest = uninterrupted / "checkpoints" / str(step)
  files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size and "d" in path.parts]
  for flip in range(30):
    path = files[flip % len(files)]
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    damaged = tmp_path / str(flip)
    shutil.copytree(newest, damaged / "checkpoints" / "400")
    (damaged / "checkpoints" / "400" / path.relative_to(newest)).write_bytes(content)
    try:
      found, _ = checkpoint_manager.restore_params(str(damaged), "ema_params", shapes)
    except ValueError as error:
      assert "400: damaged checkpoint" in str(error) and "\n" not in str(error)
      outcomes["noticed"] += 1
      continue
    jax.tree.map(np.testing.assert_array_equal, found, whole)  # a part that nothing reads
    outcomes["harmless"] += 1
  print(f"\n30 flipped bits: {outcomes}")
  assert outcomes["noticed"] >= 2 and outcomes["harmless"] < 29, "some met what is read"


def test_when_no_checkpoint_can_be_read_nothing_is_changed(uninterrupted, tmp_path):
  """However often it is tried: a disk may come back, and the run must not begin anew."""
  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  for step in (380, 400):
    truncate(workdir / "checkpoints" / str(step))
  with pytest.raises(ValueError, match=r"checkpoints/380: damaged checkpoint \("):
    pretrained.load(workdir)
  for _ in range(2):
    with pytest.raises(ValueError, match=r"no checkpoint can be read, of steps \[400, 380\]"):
      train.train(config_of(), str(workdir))
  assert checkpoint_manager.steps(str(workdir)) == [380, 400] and not (workdir / checkpoint_manager.DAMAGED).exists()
  assert losses(workdir) == losses(uninterrupted)


# Runs on a disk of 4 MB until that is full, then again after it has grown.
FULL = """
set -e
mount -t tmpfs -o size=4m tmpfs "$1"
shift
"$@" --config.checkpoint.keep=100 && exit 9
ls -a "$DISK"/run/checkpoints >&2
mount -o remount,size=50m "$DISK"
"$@" --config.checkpoint.keep=100
ls "$DISK"/run/checkpoints >&2
"""


@pytest.mark.slow
def test_a_full_disk_is_reported_and_older_checkpoints_stay(tmp_path):
  if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True).returncode:
    pytest.skip("this machine lets no test mount a small disk")
  flags = [f"--config.{name}={value}" for name, value in RUN.items()]
  command = [
    sys.executable,
    "-m",
    "eqm_jax.main",
    "--config=configs/digits.py:smoke",
    f"--workdir={tmp_path}/run",
    *flags,
  ]
  finished = subprocess.run(
    ["unshare", "-rm", "bash", "-c", FULL, "bash", str(tmp_path), *command],
    cwd=ROOT, env={**os.environ, "DISK": str(tmp_path)}, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert finished.returncode == 0, finished.stderr
  (message,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
  assert "be written" in message and "No space left" in message and str(tmp_path) in message
  if "checkpoints: " in message:  # it was not the metrics that met the end of the disk first
    assert "Those of steps [20, 40" in message
  assert "resumed from step" in finished.stderr and finished.stderr.splitlines()[-1].strip().isdigit()
  assert "step 400/400" in finished.stderr


# ---------------------------------------------------------------- workdirs


def test_two_runs_on_one_workdir_are_refused(tiny_config, tmp_path):
  with (
    workdir_lock(str(tmp_path)),
    pytest.raises(ValueError, match=rf"another run is at work here \(process {os.getpid()}"),
  ):
    train.train(tiny_config, str(tmp_path))
  tiny_config.train.steps = 2
  assert train.train(tiny_config, str(tmp_path))


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
  place = tmp_path / "file"
  place.write_text("no directory")
  with (
    pytest.raises(ValueError, match="file/run: cannot be written .*another --workdir"),
    workdir_lock(str(place / "run")),
  ):
    pass
  with tempfile.TemporaryDirectory() as guarded:  # where another user may look, unlike tmp_path
    os.chmod(guarded, 0o555)
    # Root may write anywhere.
    program = "import os, sys; from eqm_jax.io import workdir_lock\nif os.geteuid() == 0: os.setuid(65534)\n"
    program += "with workdir_lock(sys.argv[1]): print('locked')"
    finished = subprocess.run([sys.executable, "-c", program, guarded], cwd=ROOT, capture_output=True, text=True)
  assert f"{guarded}: cannot be written (Permission denied)" in finished.stderr, finished.stderr


# ---------------------------------------------------------------- numbers


@pytest.fixture
def spoilt(tiny_config, monkeypatch):
  """24 digits, of which some are not finite: the function takes their indices."""
  opened = sources.open_source

  def spoil(*indices: int):
    class Spoilt:
      def __init__(self, source):
        self._source = source
        self.num_classes, self.shape, self.autoencoder_id = source.num_classes, source.shape, source.autoencoder_id
        self.class_names = source.class_names

      def __len__(self):
        return 24

      def __getitem__(self, index):
        sample = self._source[index]
        return {**sample, "image": sample["image"] * np.nan} if index in indices else sample

    monkeypatch.setattr(sources, "open_source", lambda *arguments: Spoilt(opened(*arguments)))
    tiny_config.train.update(steps=12, log_every=1)
    return tiny_config

  return spoil


@pytest.mark.slow
def test_spoilt_batches_are_skipped_logged_and_counted(spoilt, tmp_path, caplog):
  config = spoilt(5)  # in one of the three batches of each epoch
  config.optimizer.max_skipped_batches = 2
  assert train.train(config, str(tmp_path))
  records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert records[-1]["skipped_batches"] == 4 == sum(record["loss"] is None for record in records)
  assert caplog.text.count("this batch is skipped") == 4
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pretrained.load(tmp_path).params))


@pytest.mark.slow
def test_too_many_spoilt_batches_in_a_row_end_the_run(spoilt, tmp_path):
  config = spoilt(*range(24))
  config.optimizer.max_skipped_batches, config.checkpoint.every = 2, 1
  with pytest.raises(FloatingPointError, match="step 3: .*nan.*stopped"):
    train.train(config, str(tmp_path))
  assert checkpoint_manager.steps(str(tmp_path)) == [1, 2]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pretrained.load(tmp_path).params))


@pytest.mark.slow
def test_by_default_the_first_spoilt_batch_ends_the_run(spoilt, tmp_path):
  with pytest.raises(FloatingPointError, match="step [123]: .*loss = nan"):
    train.train(spoilt(5), str(tmp_path))


# ---------------------------------------------------------------- traces


@pytest.mark.slow
def test_a_trace_of_the_steps_that_were_asked_for(tmp_path):
  run = Run(tmp_path, **{"train.steps": 9, "train.profile": "(2,3)", "optimizer.warmup_steps": 1})
  assert run.end() == 0, "".join(run.lines)
  assert list((tmp_path / profiler.DIRECTORY).rglob("*.xplane.pb"))
  assert run.logs("trace of steps 2 to 3")()


def test_a_trace_that_would_crash_is_refused(tmp_path, monkeypatch):
  """libtpu's profiler takes the process with it where there is no TPU."""
  monkeypatch.setitem(sys.modules, "libtpu", profiler)
  profiler.Profiler((1, 2), str(tmp_path))  # the tests run with JAX_PLATFORMS=cpu
  platforms = jax.config.jax_platforms
  jax.config.update("jax_platforms", None)
  try:
    with pytest.raises(ValueError, match="JAX_PLATFORMS=cpu"):
      profiler.Profiler((1, 2), str(tmp_path))
  finally:
    jax.config.update("jax_platforms", platforms)


@pytest.mark.parametrize("steps", [(3, 2), (0, 2), (0, 0), (1,), (-1, 4)])
def test_bad_steps_of_a_trace_are_refused(tiny_config, tmp_path, steps):
  tiny_config.train.profile = steps
  with pytest.raises(ValueError, match="train.profile = .* must be a first and a last step, or None"):
    train.train(tiny_config, str(tmp_path))
