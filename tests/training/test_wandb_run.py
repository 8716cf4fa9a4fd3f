"""Weights & Biases: what goes there, and that its failures end no training. Most use a stand-in of the package."""

import contextlib
import json
import os
import sys
import types

import pytest
from conftest import picture

from eqm_jax.modes import evaluate
from eqm_jax.training import wandb_run
from eqm_jax.training.metric_logger import MetricLogger
from eqm_jax.training.wandb_run import WandbRun


class Run:
  """Records what is logged; from the call `failing_from` on, every call fails, as without a service."""

  def __init__(self, failing_from=None, **options):
    self.options, self.logged, self.exit_code, self.failing_from = options, [], None, failing_from

  def define_metric(self, name, step_metric):
    assert (name, step_metric) == ("*", "step")

  def log(self, values):
    if self.failing_from is not None and len(self.logged) >= self.failing_from:
      raise BrokenPipeError("the service is gone")
    self.logged.append(values)

  def finish(self, exit_code):
    self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
  """A stand-in of the package. `runs` has what it has started."""
  module = types.ModuleType("wandb")
  module.runs, module.logged_in, module.mode, module.failing_from, module.broken = [], True, "online", None, ()

  def init(mode=module.mode, **options):
    if mode in module.broken:
      raise ConnectionError(f"{mode}: no such host")
    module.runs.append(Run(module.failing_from, mode=mode, **options))
    return module.runs[-1]

  module.init, module.Image, module.Settings = init, lambda image: ("image", image.size), dict
  module.login = lambda prompt: module.logged_in
  module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=module.mode))
  monkeypatch.setitem(sys.modules, "wandb", module)
  monkeypatch.delenv("WANDB_NAME", raising=False)
  return module


@pytest.fixture
def config(tiny_config):
  tiny_config.train.wandb_project = "eqm"
  return tiny_config


def open_logger(config, workdir) -> MetricLogger:
  options = dict(first_step=0, last_step=100, batch_size=8, log_every=10, flops_per_example=1000)
  return MetricLogger(str(workdir), **options, wandb_run=WandbRun(config, str(workdir)))


def test_metrics_and_pictures_go_to_the_project(wandb, config, tmp_path):
  with contextlib.closing(open_logger(config, tmp_path)) as logger:
    logger.write(10, {"loss": 0.5})
    logger.write_evaluation(8, {"raw/frechet": 3.0})
    logger.write_picture(8, "samples", picture(size=(12, 10)))
  (run,) = wandb.runs
  assert run.logged == [
    {"step": 10, "loss": 0.5},
    {"step": 8, "raw/frechet": 3.0},
    {"step": 8, "samples": ("image", (12, 10))},
  ]
  assert run.exit_code == 0
  assert run.options["project"] == "eqm" and run.options["name"] == tmp_path.name and run.options["mode"] == "online"
  assert run.options["config"]["train"]["steps"] == config.train.steps and run.options["dir"] == str(tmp_path)
  assert "samples" in next((tmp_path / "tensorboard").iterdir()).read_bytes().decode(errors="ignore")


def test_a_resumed_training_continues_the_run_and_another_workdir_has_another(wandb, config, tmp_path):
  for workdir in ("a", "a", "b"):
    os.makedirs(tmp_path / workdir, exist_ok=True)
    WandbRun(config, str(tmp_path / workdir)).close()
  first, resumed, other = (run.options for run in wandb.runs)
  assert first["id"] == resumed["id"] != other["id"] and resumed["resume"] == "allow"
  assert json.loads((tmp_path / "a" / "wandb.json").read_text()) == {"id": first["id"], "project": "eqm"}


def test_a_training_that_fails_is_a_run_that_failed(wandb, config, tmp_path):
  with pytest.raises(FloatingPointError), contextlib.closing(open_logger(config, tmp_path)):
    raise FloatingPointError
  assert wandb.runs[0].exit_code == 1


@pytest.mark.parametrize("logged_in, broken, reason", [(False, (), "no API key"), (True, ("online",), "no such host")])
def test_without_login_or_network_a_run_is_kept_offline(wandb, config, tmp_path, caplog, logged_in, broken, reason):
  wandb.logged_in, wandb.broken = logged_in, broken
  run = WandbRun(config, str(tmp_path))
  run.log(1, {"loss": 1.0})
  assert wandb.runs[-1].options["mode"] == "offline" and wandb.runs[-1].logged
  assert len(caplog.messages) == 1 and reason in caplog.text
  assert f"upload it by `wandb sync {tmp_path}/wandb/offline-run-*`" in caplog.text


def test_offline_by_choice_there_is_no_warning(wandb, config, tmp_path, caplog):
  wandb.logged_in, wandb.mode = False, "offline"
  WandbRun(config, str(tmp_path)).close()
  assert not caplog.messages


@pytest.mark.parametrize("broken, failing_from, steps", [(("online", "offline"), None, 0), ((), 0, 0), ((), 2, 2)])
def test_whatever_fails_is_one_warning_and_the_files_have_all(
  wandb, config, tmp_path, caplog, broken, failing_from, steps
):
  wandb.broken, wandb.failing_from = broken, failing_from
  with contextlib.closing(open_logger(config, tmp_path)) as logger:
    for step in range(1, 6):
      logger.write(step, {"loss": 0.5})
      logger.write_picture(step, "samples", picture())
  assert sum(len(run.logged) for run in wandb.runs) == steps
  assert caplog.text.count("Training goes on without it") == len(caplog.messages) == 1
  assert "wandb sync" in caplog.text
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_damaged_id_is_one_warning(wandb, config, tmp_path, caplog):
  (tmp_path / "wandb.json").write_text("{")
  WandbRun(config, str(tmp_path)).log(1, {})
  assert not wandb.runs and len(caplog.messages) == 1 and "wandb.json: not readable" in caplog.text


def test_without_a_project_and_in_other_processes_nothing_is_started(wandb, config, tmp_path, monkeypatch):
  monkeypatch.setattr(wandb_run.distributed, "process_index_and_count", lambda: (1, 2))
  WandbRun(config, str(tmp_path)).close()
  monkeypatch.undo()
  config.train.wandb_project = None
  monkeypatch.setitem(sys.modules, "wandb", None)  # not even imported
  WandbRun(config, str(tmp_path)).close()
  wandb_run.check(None)
  assert not wandb.runs and not list(tmp_path.iterdir())


def test_an_evaluation_goes_to_the_run_of_its_workdir(wandb, config, tmp_path, monkeypatch):
  (tmp_path / "evaluation").mkdir()
  picture(size=(12, 10)).save(tmp_path / "evaluation" / "samples_gd.png")
  row = {"metrics": {"raw": {"frechet": 3.0, "recall": None}}}
  report = {"weights": {"step": 40}, "rows": {"gd": row}}
  monkeypatch.setattr(evaluate.evaluator, "evaluate", lambda *_: report)
  WandbRun(config, str(tmp_path)).close()
  no_names = types.SimpleNamespace(class_names=None)
  evaluate.write_evaluation(config, str(tmp_path), no_names, no_names, {})
  training, evaluation = wandb.runs
  assert evaluation.options["id"] == training.options["id"] and evaluation.exit_code == 0
  assert evaluation.logged == [{"step": 40, "gd/raw/frechet": 3.0}, {"step": 40, "gd/samples": ("image", (12, 10))}]


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])
def test_a_missing_package_is_refused_with_its_command(monkeypatch, module):
  """An empty module is a directory wandb/ beside the program, where its runs are kept by default."""
  monkeypatch.setitem(sys.modules, "wandb", module)
  with pytest.raises(
    ValueError, match=r"train.wandb_project = 'eqm' needs the package: pip install 'eqm_jax\[wandb\]'"
  ):
    wandb_run.check("eqm")


def test_the_package_itself_offline(config, tmp_path, monkeypatch, caplog):
  package = pytest.importorskip("wandb", reason="wandb is not installed")
  monkeypatch.setenv("WANDB_MODE", "offline")
  wandb_run.check("eqm")
  for step in (1, 2):
    with contextlib.closing(open_logger(config, tmp_path)) as logger:
      logger.write(step, {"loss": 0.5})
      logger.write_picture(step, "samples", picture())
  assert not caplog.messages
  directories = sorted((tmp_path / "wandb").glob("offline-run-*"))
  run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
  assert directories and all(directory.name.endswith(run_id) for directory in directories)
  assert list((tmp_path / "wandb").rglob("samples*.png"))
  assert any(b"loss" in file.read_bytes() for directory in directories for file in directory.glob("*.wandb"))
  package.teardown()
