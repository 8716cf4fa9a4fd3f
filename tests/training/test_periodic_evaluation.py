import json

import jax
import pytest
from conftest import ended, start_python

from eqm_jax.checkpoints import manager as checkpoint_manager
from eqm_jax.checkpoints import pretrained
from eqm_jax.data import builtin
from eqm_jax.evaluation.reference_data import ReferenceData
from eqm_jax.networks.dit import DiT
from eqm_jax.sampling.generator import Generator
from eqm_jax.training import periodic_evaluation, train


def start(config, workdir, distances, monkeypatch):
  """Trains, with these distances in the place of those of the samples."""
  remaining = iter(distances)
  monkeypatch.setattr(ReferenceData, "metrics", lambda self, store: {"raw": {"frechet": next(remaining)}})
  return train.train(config, str(workdir), reference=open_reference(config), generator=make_generator(config))


def open_reference(config):
  return ReferenceData(config.evaluation, builtin.digits(), None, 2)


def make_generator(config):
  return Generator(DiT(**config.model), None, jax.random.key(0), batch_size=2, multiplier=4.0)


def metrics(workdir) -> dict[int, float]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["raw/frechet"] for line in lines if "raw/frechet" in line}


@pytest.fixture
def config(tiny_config):
  tiny_config.checkpoint.update(every=2, keep=1)
  tiny_config.evaluation.during_training.update(every=3, num_samples=10, sampler="adaptive")
  return tiny_config


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_can_be_loaded(config, tmp_path, monkeypatch):
  assert start(config, tmp_path, [5.0, 2.0, 4.0, 3.0], monkeypatch)
  assert metrics(tmp_path) == {3: 5.0, 6: 2.0, 9: 4.0, 12: 3.0}
  best = json.loads((tmp_path / "best.json").read_text())
  assert best["best"] == {"step": 6, "frechet": 2.0} and best["settings"]["features"] == [{"name": "raw"}]
  assert checkpoint_manager.steps(str(tmp_path)) == [6, 12], "the best and the newest"
  assert (tmp_path / "best.png").stat().st_size > 1000
  assert len(list((tmp_path / "evaluation" / "steps").iterdir())) == 4
  assert "step 12, raw/frechet 3" in (tmp_path / "report.html").read_text()
  loaded, newest = (pretrained.load(str(tmp_path / end)) for end in ("checkpoints/6", ""))
  assert loaded.step == 6 and newest.step == 12
  kernels = [one.params["blocks"]["qkv"]["kernel"] for one in (loaded, newest)]
  assert not (kernels[0] == kernels[1]).all()
  with pytest.raises(ValueError, match=r"no finished checkpoint of step 5 .* there are \[6, 12\]"):
    pretrained.load(str(tmp_path / "checkpoints" / "5"))


@pytest.mark.slow
def test_a_resumed_run_reads_its_metrics_and_evaluates_what_is_missing(config, tmp_path, monkeypatch):
  config.train.steps = 6
  start(config, tmp_path, [5.0, 2.0], monkeypatch)
  saved = json.loads((tmp_path / "best.json").read_text())
  del saved["metrics"]["6"]  # killed before the last distance was computed
  (tmp_path / "best.json").write_text(json.dumps(saved))
  config.train.steps = 12
  config.optimizer.schedule = "constant"
  monkeypatch.setattr(train.validation, "check_same_run", lambda *_: None)  # it would refuse the longer run
  start(config, tmp_path, [2.0, 4.0, 3.0], monkeypatch)
  assert metrics(tmp_path) == {3: 5.0, 6: 2.0, 9: 4.0, 12: 3.0}
  assert json.loads((tmp_path / "best.json").read_text())["best"]["step"] == 6
  assert checkpoint_manager.steps(str(tmp_path)) == [6, 12]


@pytest.mark.slow
def test_metrics_of_other_settings_are_dropped(config, tmp_path, monkeypatch, caplog):
  config.train.steps = 3
  start(config, tmp_path, [0.1], monkeypatch)
  config.train.steps = 6
  config.evaluation.during_training.num_samples = 12
  monkeypatch.setattr(train.validation, "check_same_run", lambda *_: None)
  start(config, tmp_path, [5.0, 4.0], monkeypatch)  # step 3 again, and 6
  assert "metrics of other settings" in caplog.text
  assert json.loads((tmp_path / "best.json").read_text())["best"] == {"step": 6, "frechet": 4.0}


@pytest.mark.slow
def test_the_evaluation_does_not_change_the_training(config, tmp_path, monkeypatch):
  start(config, tmp_path / "evaluated", [5.0, 2.0, 4.0, 3.0], monkeypatch)
  config.evaluation.during_training.every = None
  train.train(config, str(tmp_path / "plain"))
  one, other = (pretrained.load(str(tmp_path / name)).params for name in ("evaluated", "plain"))
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, other)))


def test_samples_that_cannot_be_compared_end_no_run(config, tmp_path, monkeypatch, caplog):
  config.train.steps = 3

  def failing(self, store):
    raise RuntimeError("the device has no room")

  monkeypatch.setattr(ReferenceData, "metrics", failing)
  assert train.train(config, str(tmp_path), reference=open_reference(config), generator=make_generator(config))
  assert "evaluation during training: the device has no room" in caplog.text
  assert not (tmp_path / "best.json").exists()


PROGRAM = """
import sys
import jax
from conftest import connection, load_config

jax.distributed.initialize(*connection())
from eqm_jax import modes

config = load_config("digits", "smoke")
config.model.update(width=16, depth=1, num_heads=2)
config.evaluation.plot_sampler = None
config.evaluation.chunk_size = 10
config.mesh.update(data=-1, fsdp=1)
modes.run("train", config, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_evaluate_together(tmp_path):
  ended(start_python("-c", PROGRAM, tmp_path, processes=2), timeout=400)
  assert set(metrics(tmp_path)) == {30, 60}
  metrics_of_run = json.loads((tmp_path / "best.json").read_text())["metrics"]
  report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
  assert metrics_of_run["60"]["raw"] == report["rows"]["adaptive"]["metrics"]["raw"], "the same samples, twice"


@pytest.mark.parametrize(
  "changes, text",
  [
    (dict(every=-1), "every = -1 must be at least 1"),
    (dict(every=0), "every = 0 must be at least 1: None"),
    (dict(num_samples=1), "num_samples = 1 must be at least 2"),
    (dict(sampler="best"), "sampler = 'best' must be one of .*adaptive"),
  ],
)
def test_bad_numbers_are_refused(config, changes, text):
  config.evaluation.during_training.update(changes)
  with pytest.raises(ValueError, match=text):
    periodic_evaluation.check(config, make_generator(config))
