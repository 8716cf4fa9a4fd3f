"""Modes from Python: what they return and show, and what they leave as it was. The README runs a real one."""

import base64
import errno
import html
import importlib.metadata
import io
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import types

import jax
import pytest
from absl import flags
from conftest import ROOT, picture

import eqm_jax
from eqm_jax import modes, notebook, progress

LOG = logging.getLogger("eqm_jax")


@pytest.fixture
def kernel(monkeypatch):
  """A notebook's kernel, as far as the package looks at it."""
  shell = types.SimpleNamespace(kernel=types.SimpleNamespace())
  monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))


@pytest.fixture
def mode(monkeypatch):
  """A mode that logs, and writes what modes write."""
  calls = []

  def run(name, config, workdir, checkpoint, **flags):
    directory = pathlib.Path(workdir).expanduser()
    (directory / "evaluation" / "images").mkdir(parents=True, exist_ok=True)
    logging.getLogger("eqm_jax.modes").info("a line")
    calls.append((name, config.train.steps, workdir, checkpoint, flags))
    for name in ("best.png", "evaluation/samples.png", "evaluation/images/0.png", "evaluation/descent.gif"):
      picture().save(directory / name)
    (directory / "config.json").write_text("{}")
    (directory / "metrics.jsonl").write_text(
      '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "frechet": 5}\n'
    )
    (directory / "evaluation" / "evaluation.json").write_text(json.dumps({"frechet": len(calls)}))
    (directory / "evaluation" / "evaluation.md").write_text("| a < b |\n")

  monkeypatch.setattr(modes, "run", run)
  return calls


@pytest.fixture
def quiet():
  """The package's logger as an interpreter has it, which pytest's handlers are not part of."""
  saved = LOG.level, LOG.propagate, LOG.handlers[:]
  LOG.handlers.clear()
  LOG.setLevel(logging.NOTSET)
  yield
  LOG.level, LOG.propagate, LOG.handlers[:] = saved


def test_an_outcome_has_what_the_mode_has_written(tmp_path, mode, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "older.png").touch()
  outcome = eqm_jax.run("train", eqm_jax.config("digits"), "~/run", topology="v5e-16")
  assert mode == [("train", 4000, "~/run", None, {"topology": "v5e-16"})]
  assert outcome.metrics == {"evaluation": {"frechet": 1}, "training": {"step": 2, "loss": 2}}
  assert list(outcome.figures) == ["best.png", "evaluation/descent.gif", "evaluation/samples.png"]
  assert outcome.tables == {"evaluation/evaluation.md": "| a < b |\n"}
  assert str(outcome.workdir) == str(tmp_path / "run") and "evaluation/samples.png" in repr(outcome)
  again = eqm_jax.run("evaluate", "digits", tmp_path / "run", "exported")
  assert mode[1][3] == "exported" and again.metrics["evaluation"] == {"frechet": 2}


def test_pictures_and_tables_are_shown_inline(tmp_path, mode, monkeypatch):
  outcome = eqm_jax.run("train", "digits", tmp_path)
  figure = outcome.figures["evaluation/samples.png"]
  bundle = figure._repr_mimebundle_()
  assert base64.b64decode(bundle["image/png"]) == (tmp_path / "evaluation" / "samples.png").read_bytes()
  assert "<img" in outcome.figures["evaluation/descent.gif"]._repr_mimebundle_()["text/html"]
  assert open(figure, "rb").read(4) == b"\x89PNG"
  page = outcome._repr_html_()
  assert page.count("<img") == 3 and bundle["image/png"] in page and "a &lt; b" in page
  monkeypatch.setattr(notebook, "MAX_EMBEDDED", 10)
  page = outcome._repr_html_()
  assert "<img" not in page and "samples.png (0.0 MiB)" in page
  monkeypatch.setattr(notebook, "MAX_SHOWN", 1)
  assert "figures['evaluation/samples.png']" in html.unescape(outcome._repr_html_())


def test_lines_are_shown_once_and_loggers_are_as_before(tmp_path, mode, quiet, capsys):
  for _ in range(2):
    eqm_jax.run("train", "digits", tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == [f"train in {tmp_path}", "a line"]
  assert not LOG.handlers and LOG.level == logging.NOTSET and LOG.propagate


def test_lines_that_the_callers_loggers_show_are_left_to_them(tmp_path, mode, quiet, capsys):
  stream = io.StringIO()
  LOG.addHandler(logging.StreamHandler(stream))
  LOG.setLevel(logging.INFO)
  eqm_jax.run("train", "digits", tmp_path)
  assert "a line" in stream.getvalue() and not capsys.readouterr().err


def test_a_kernel_gets_lines_on_its_output_and_bars(tmp_path, mode, quiet, kernel, capsys):
  eqm_jax.run("train", "digits", tmp_path)
  assert "a line" in capsys.readouterr().out
  with progress.Progress(total=2, desc="gd") as bar:
    bar.update(2)
  assert "gd: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, FloatingPointError, OSError, KeyboardInterrupt])
def test_errors_pass_through_and_loggers_are_as_before(tmp_path, quiet, monkeypatch, error):
  def run(*arguments, **flags):
    raise error("as it is")

  monkeypatch.setattr(modes, "run", run)
  with pytest.raises(error, match="^as it is$"):
    eqm_jax.run("train", "digits", tmp_path)
  assert not LOG.handlers and LOG.propagate


@pytest.mark.parametrize(
  "mode_name, config, workdir, message",
  [
    ("dream", "digits", "run", "mode = 'dream' must be one of prepare, train"),
    ("train", "digit", "run", "config 'digit': there is no such file"),
    ("train", {"train": {"steps": 3}}, "run", r"config is a dict, .* eqm_jax.config\('digits'\)"),
    ("train", "digits", "gs://bucket/run", "--workdir=gs://bucket/run must be a directory"),
    ("train", "digits", "", "--workdir= must be a directory"),
  ],
)
def test_mistakes_are_refused_before_the_workdir_is_touched(tmp_path, monkeypatch, mode_name, config, workdir, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=message):
    eqm_jax.run(mode_name, config, workdir)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_imported", [False, True])
def test_before_jax_is_imported_an_absent_tpu_is_ruled_out(tmp_path, mode, monkeypatch, is_imported):
  calls = []
  monkeypatch.setattr(notebook.hardware, "use_cpu_without_accelerator", lambda: calls.append(1))
  if not is_imported:
    monkeypatch.delitem(sys.modules, "jax")
  eqm_jax.run("train", "digits", tmp_path)
  assert len(calls) == (not is_imported)


def test_flags_of_absl_are_not_needed(tmp_path, mode):
  before = set(flags.FLAGS)
  eqm_jax.run("train", "digits", tmp_path)
  assert set(flags.FLAGS) == before


def test_a_full_disk_is_named_with_a_remedy(tmp_path, monkeypatch):
  def run(config, workdir):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  declared = modes.Mode("sample", "", "", run, "none", "one", needs_devices=False)
  monkeypatch.setattr(modes, "declaration", lambda name: declared)
  with pytest.raises(OSError, match=rf"^{tmp_path}: cannot be written \(No space left on device\): make room"):
    eqm_jax.run("sample", "digits", tmp_path)


def test_the_oldest_jax_is_that_of_the_metadata():
  assert f'"jax>={notebook.OLDEST_JAX}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_a_session_that_is_ready_prints_versions_and_devices(capsys):
  notebook.check()
  notebook.check(platform="cpu")
  lines = capsys.readouterr().out.splitlines()
  version = re.escape(importlib.metadata.version("jax"))
  assert len(lines) == 2 and re.fullmatch(rf"eqm_jax .*, jax {version}, .*; devices: \d+ × cpu", lines[0])


def not_ready(function, *arguments, **options) -> str:
  """The one line that IPython shows."""
  with pytest.raises(notebook.NotReady) as caught:
    function(*arguments, **options)
  (line,) = caught.value._render_traceback_()
  assert "\n" not in line
  return line


@pytest.mark.parametrize("name, version", [("jax", "0.7.2"), ("numpy", "1.26.4"), ("jaxlib", "99.1")])
def test_a_module_of_another_version_in_the_session_asks_for_a_restart(monkeypatch, name, version):
  monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__version__=version))
  line = not_ready(notebook.check)
  assert f"{name} {version} is in this session, but {importlib.metadata.version(name)} is installed" in line
  assert "restart the session (Colab: Runtime; Kaggle: Run)" in line


def test_an_old_jax_that_is_installed_is_refused(monkeypatch):
  monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.2")
  for name in notebook.LOADED_ONCE:
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__version__="0.7.2"))
  assert "jax 0.7.2 is installed, but 0.10.2 or newer is needed" in not_ready(notebook.check)


def test_a_session_without_the_device_is_refused(monkeypatch):
  assert re.search(r"no TPU, but \d+ × cpu: choose another runtime", not_ready(notebook.check, platform="tpu"))

  def devices():
    raise RuntimeError("Unable to initialize backend 'tpu': UNAVAILABLE: it is held by process 7\nsecond line")

  monkeypatch.setattr(jax, "devices", devices)
  line = not_ready(notebook.check)
  assert "held by process 7" in line and "if another notebook holds the TPU, end it" in line


def colab(monkeypatch, mount):
  """The module that Colab mounts Google Drive with."""
  monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace())
  monkeypatch.setitem(sys.modules, "google.colab.drive", types.SimpleNamespace(mount=mount))


@pytest.fixture
def drive(tmp_path, monkeypatch):
  monkeypatch.setattr(notebook, "DRIVE", tmp_path / "drive")
  return tmp_path / "drive"


def test_drive_is_mounted_when_it_is_needed(drive, monkeypatch):
  mounted = []

  def mount(path):
    mounted.append(path)
    (drive / "MyDrive").mkdir(parents=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == drive)

  colab(monkeypatch, mount)
  for _ in range(2):
    assert notebook.directory(drive / "MyDrive" / "eqm", free_gb=0).is_dir()
  assert mounted == [str(drive)] and not list((drive / "MyDrive" / "eqm").iterdir())


def test_a_drive_that_is_not_mounted_is_refused_and_nothing_is_made(drive, monkeypatch):
  path = drive / "MyDrive" / "eqm"
  assert "Google Drive is not mounted (only Colab has it)" in not_ready(notebook.directory, path)
  assert "Google Drive is not mounted" in not_ready(notebook.check_files, {str(path): "somewhere"})

  def mount(path):
    raise ValueError("mount failed")

  colab(monkeypatch, mount)
  assert "Google Drive is not mounted (mount failed): run drive.mount" in not_ready(notebook.directory, path)
  assert not drive.exists()


def test_a_full_drive_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0.3e9))
  line = not_ready(notebook.directory, tmp_path, free_gb=2)
  assert "has 0.3 GB of room, but 2 GB are needed: make room (Drive counts its bin, too)" in line

  def write_bytes(self, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
  assert "cannot be written (No space left on device): make room" in not_ready(notebook.directory, tmp_path)


def test_files_that_are_missing_are_named_together(tmp_path):
  (tmp_path / "here.pt").touch()
  origins = {str(tmp_path / name): f"place of {name}" for name in ("here.pt", "EqM.pt", "vae")}
  line = not_ready(notebook.check_files, origins)
  assert "EqM.pt (from place of EqM.pt); " in line and "vae (from place of vae)" in line and "here.pt" not in line
  (tmp_path / "EqM.pt").touch()
  (tmp_path / "vae").mkdir()
  notebook.check_files(origins)


def test_a_slider_shows_its_last_picture():
  page = notebook.Slider([picture(seed=i) for i in range(3)], ["a", "b", "<c>"])._repr_html_()
  assert page.count("<img") == 3 and page.count("display:none") == 2 and 'max="2" value="2"' in page
  assert page.index("display:block") < page.index("&lt;c&gt;")
  with pytest.raises(ValueError):
    notebook.Slider([picture()], [])._repr_html_()


def test_a_kernel_gets_no_tables_of_parameters(tmp_path, mode, quiet, kernel, capsys, monkeypatch):
  run = modes.run

  def with_table(*arguments, **flags):
    logging.getLogger("eqm_jax.training").info("model\n%s", "a table")
    run(*arguments, **flags)

  monkeypatch.setattr(modes, "run", with_table)
  eqm_jax.run("train", "digits", tmp_path)
  out = capsys.readouterr().out
  assert "a line" in out and "a table" not in out
