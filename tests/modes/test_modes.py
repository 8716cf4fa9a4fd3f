"""Declarations of the modes, and the checks that they are for."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT

from eqm_jax import distributed, experiments, modes
from eqm_jax.io import workdir_lock
from eqm_jax.modes import train

HELPERS = {"__init__", "common", "task"}


def test_each_file_is_a_mode_and_each_mode_a_file():
  files = {path.stem for path in (ROOT / "eqm_jax" / "modes").glob("*.py")}
  assert files - HELPERS == set(modes.NAMES) and len(set(modes.NAMES)) == len(modes.NAMES)


@pytest.mark.parametrize("name", modes.NAMES)
def test_a_declaration_is_read_as_it_is_written(name):
  read, written = modes.declaration(name), importlib.import_module(f"eqm_jax.modes.{name}").MODE
  for field in ("name", "summary", "writes", "checkpoint", "processes", "flags", "needs_devices", "checkpoint_hint"):
    assert getattr(read, field) == getattr(written, field)
  assert written.name == name and "\n" not in written.summary and written.writes
  assert written.checkpoint in ("needs", "takes", "none") and written.processes in ("one", "many")
  assert bool(written.checkpoint_hint) == (written.checkpoint == "none")


def test_declarations_and_help_import_neither_jax_nor_a_mode():
  program = "import sys; from eqm_jax import modes; modes.table()\n"
  program += "assert not {'jax', 'numpy', 'eqm_jax.modes.train'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
  "mode, flags, message",
  [
    (
      "train",
      {"checkpoint": "x.pt"},
      "--checkpoint=x.pt: --mode=train takes no checkpoint: training resumes .*init_from",
    ),
    (
      "prepare",
      {"checkpoint": "x.pt"},
      "takes no checkpoint: preparing data needs no model.*--config.autoencoder.path",
    ),
    (
      "statistics",
      {"checkpoint": "x.pt"},
      "takes no checkpoint: statistics are of the data set.*It is for .*=evaluate",
    ),
    ("report", {"checkpoint": "x.pt"}, "takes no checkpoint: a report trains its own models"),
    ("plan", {"checkpoint": "x.pt"}, "takes no checkpoint: a plan needs no weights"),
    ("train", {"topology": "v4-32"}, "--topology=v4-32: --mode=train has no such flag.*It is for --mode=plan"),
    ("sample", {"search": True}, "--search: --mode=sample has no such flag: leave it out. It is for --mode=plan"),
    ("sample", {"compare": "a.json"}, "--compare=a.json: --mode=sample has no such flag.*It is for --mode=benchmark"),
    ("plan", {"compare_any": True}, "--compare_any: --mode=plan has no such flag.*It is for --mode=benchmark"),
    ("sample", {"labels": 3}, "--labels=3: --mode=sample has no such flag: leave it out. It is for no mode"),
  ],
)
def test_flags_of_other_modes_are_refused(tiny_config, tmp_path: pathlib.Path, mode, flags, message):
  with pytest.raises(ValueError, match=message):
    modes.run(mode, tiny_config, str(tmp_path), **flags)
  assert not any(tmp_path.iterdir())


ONE = ("sample", "denoise", "ood", "compose", "inpaint", "readout", "report", "benchmark")


@pytest.mark.parametrize("mode", ONE)
def test_modes_of_one_process_are_refused_in_several(tiny_config, tmp_path, mode, monkeypatch):
  monkeypatch.setattr(distributed, "process_index_and_count", lambda: (0, 2))
  with pytest.raises(ValueError, match=f"--mode={mode} runs in one process, not in 2: .*--mode=evaluate"):
    modes.run(mode, tiny_config, str(tmp_path))


def test_the_other_modes_share_the_work_of_several_processes():
  many = {name for name in modes.NAMES if modes.declaration(name).processes == "many"}
  assert many == set(modes.NAMES) - set(ONE) - {"plan"} and not modes.declaration("plan").needs_devices


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"optimizer.clip_norm": -1.0}, "optimizer.clip_norm = -1.0 must be"),
    ({"optimizer.schedule": "step"}, "optimizer.schedule = 'step' must be one of"),
    ({"train.profile": (5, 3)}, r"train.profile = \(5, 3\) must be a first and a last step"),
    ({"train.steps": 0}, "train.steps = 0 must be at least 1"),
    ({"mesh.data": 3}, "mesh data=3, fsdp=1, tensor=1 needs 3 devices, but there are 1"),
    ({"sharding.rules": (("kernel", ("rows",)),)}, "sharding rule 'kernel'"),
    ({"sharding.ema": "hosts"}, "sharding.ema = 'hosts' must be one of"),
    ({"train.batch_size": 9, "train.grad_accum_steps": 2}, "batch size 9 does not divide"),
    ({"objective.schedule.kind": "cubic"}, "cubic"),
    ({"checkpoint.keep": 0}, "checkpoint.keep = 0 must be"),
    ({"model.patch_size": 3}, "patch_size = 3 does not divide"),
    ({"evaluation.features": ("pixels",)}, "pixels"),
  ],
)
def test_training_is_refused_before_any_work(tiny_config, tmp_path, monkeypatch, changes, message):
  for module, name in ((train.prepare, "prepare"), (train.common, "open_source"), (train.train.sources, "open_source")):
    monkeypatch.setattr(module, name, lambda *_: pytest.fail("data is opened"))
  for key, value in changes.items():
    experiments.set_value(tiny_config, key, value)
  with pytest.raises(ValueError, match=message):
    modes.run("train", tiny_config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_training_is_refused_at_once_in_a_workdir_of_another_run(tiny_config, tmp_path, monkeypatch):
  monkeypatch.setattr(train.common, "open_source", lambda *_: pytest.fail("data is opened"))
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  saved = json.loads(tiny_config.to_json()) | {"seed": 5}
  (tmp_path / "config.json").write_text(json.dumps(saved))
  monkeypatch.setattr(train.train.validation.checkpoint_manager, "steps", lambda workdir: [4])
  with pytest.raises(ValueError, match="seed: 5 in the workdir, 0 in this config"):
    modes.run("train", tiny_config, str(tmp_path))
  (tmp_path / "config.json").unlink()
  with workdir_lock(str(tmp_path)), pytest.raises(ValueError, match="another run is at work here"):
    modes.run("train", tiny_config, str(tmp_path))


def test_the_home_directory_may_begin_every_path(tiny_config, tmp_path, monkeypatch):
  seen = []
  mode = dataclasses.replace(modes.declaration("compose"), run=lambda *values, **flags: seen.append((*values, flags)))
  monkeypatch.setattr(modes, "declaration", lambda name: mode)
  monkeypatch.setenv("HOME", str(tmp_path))
  tiny_config.data.options.path = tiny_config.tasks.images = tiny_config.autoencoder.path = "~/x"
  tiny_config.tasks.compose.checkpoints = ("~/a", None, "b~")
  modes.run("compose", tiny_config, "~/run", checkpoint="~/model.pt")
  ((config, workdir, flags),) = seen
  assert workdir == f"{tmp_path}/run" and flags == {"checkpoint": f"{tmp_path}/model.pt"}
  assert config.data.options.path == config.tasks.images == config.autoencoder.path == f"{tmp_path}/x"
  assert config.tasks.compose.checkpoints == (f"{tmp_path}/a", None, "b~")


def test_a_workdir_is_a_directory_that_can_be_written(tiny_config, tmp_path):
  with pytest.raises(ValueError, match="--workdir=gs://bucket/run must be a directory: give one"):
    modes.run("train", tiny_config, "gs://bucket/run")
  (tmp_path / "file").write_text("")
  text = "file/run: cannot be written: choose another --workdir, with --checkpoint=.*/file/run for the model"
  with pytest.raises(ValueError, match=text):
    modes.run("sample", tiny_config, str(tmp_path / "file" / "run"))
