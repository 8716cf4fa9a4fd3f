"""Declarations of the modes, and the checks that they are for."""

import importlib
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT

from eqm_jax import distributed, modes

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
  ],
)
def test_flags_of_other_modes_are_refused(tiny_config, tmp_path: pathlib.Path, mode, flags, message):
  with pytest.raises(ValueError, match=message):
    modes.run(mode, tiny_config, str(tmp_path), **flags)
  assert not any(tmp_path.iterdir())


ONE = ("sample", "denoise", "ood", "compose", "inpaint", "report", "benchmark")


@pytest.mark.parametrize("mode", ONE)
def test_modes_of_one_process_are_refused_in_several(tiny_config, tmp_path, mode, monkeypatch):
  monkeypatch.setattr(distributed, "process_index_and_count", lambda: (0, 2))
  with pytest.raises(ValueError, match=f"--mode={mode} runs in one process, not in 2: .*--mode=evaluate"):
    modes.run(mode, tiny_config, str(tmp_path))


def test_the_other_modes_share_the_work_of_several_processes():
  many = {name for name in modes.NAMES if modes.declaration(name).processes == "many"}
  assert many == set(modes.NAMES) - set(ONE) - {"plan"} and not modes.declaration("plan").needs_devices
