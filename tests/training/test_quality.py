import json
import subprocess
import sys

import jax
import pytest
from conftest import environment, free_port

from eqm_jax.data import shipped
from eqm_jax.evaluation import comparison, samplers
from eqm_jax.networks.dit import DiT
from eqm_jax.training import checkpoint, pretrained, quality, train


def start(config, workdir, distances, monkeypatch):
  """Trains, with these distances in the place of those of the samples."""
  known = comparison.Comparison(config.evaluation, shipped.digits(), None, 2)
  left = iter(distances)
  monkeypatch.setattr(comparison.Comparison, "scores", lambda self, parts: {"raw": {"frechet": next(left)}})
  return train.train(config, str(workdir), None, known, samplers.Batching(2, jax.random.key(0), 4.0))


def metrics(workdir) -> dict[int, float]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["raw/frechet"] for line in lines if "raw/frechet" in line}


@pytest.fixture
def config(tiny_config):
  tiny_config.checkpoint.update(every=2, keep=1)
  tiny_config.evaluation.during_training.update(every=3, samples=10, sampler="adaptive")
  return tiny_config


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_can_be_loaded(config, tmp_path, monkeypatch):
  assert start(config, tmp_path, [5.0, 2.0, 4.0, 3.0], monkeypatch)
  assert metrics(tmp_path) == {3: 5.0, 6: 2.0, 9: 4.0, 12: 3.0}
  best = json.loads((tmp_path / "best.json").read_text())
  assert best["best"] == {"step": 6, "frechet": 2.0} and best["settings"]["features"] == [{"name": "raw"}]
  assert checkpoint.steps(str(tmp_path)) == [6, 12], "the best and the newest"
  assert (tmp_path / "best.png").stat().st_size > 1000
  loaded, newest = (pretrained.load(str(tmp_path / end)) for end in ("checkpoints/6", ""))
  assert loaded.step == 6 and newest.step == 12
  kernels = [one.params["blocks"]["qkv"]["kernel"] for one in (loaded, newest)]
  assert not (kernels[0] == kernels[1]).all()
  with pytest.raises(ValueError, match=r"no finished checkpoint of step 5 .* there are \[6, 12\]"):
    pretrained.load(str(tmp_path / "checkpoints" / "5"))


@pytest.mark.slow
def test_a_resumed_run_knows_what_was_found_and_judges_what_was_not(config, tmp_path, monkeypatch):
  config.train.steps = 6
  start(config, tmp_path, [5.0, 2.0], monkeypatch)
  known = json.loads((tmp_path / "best.json").read_text())
  del known["scores"]["6"]  # killed before the last distance was there
  (tmp_path / "best.json").write_text(json.dumps(known))
  config.train.steps = 12
  config.optimizer.schedule = "constant"
  monkeypatch.setattr(train.checks, "check_same_run", lambda *_: None)  # it would refuse the longer run
  start(config, tmp_path, [2.0, 4.0, 3.0], monkeypatch)
  assert metrics(tmp_path) == {3: 5.0, 6: 2.0, 9: 4.0, 12: 3.0}
  assert json.loads((tmp_path / "best.json").read_text())["best"]["step"] == 6
  assert checkpoint.steps(str(tmp_path)) == [6, 12]


@pytest.mark.slow
def test_scores_that_were_found_in_another_way_are_left_out(config, tmp_path, monkeypatch, caplog):
  config.train.steps = 3
  start(config, tmp_path, [0.1], monkeypatch)
  config.train.steps = 6
  config.evaluation.during_training.samples = 12
  monkeypatch.setattr(train.checks, "check_same_run", lambda *_: None)
  start(config, tmp_path, [5.0, 4.0], monkeypatch)  # step 3 again, and 6
  assert "found in another way" in caplog.text
  assert json.loads((tmp_path / "best.json").read_text())["best"] == {"step": 6, "frechet": 4.0}


@pytest.mark.slow
def test_the_scores_do_not_touch_the_training(config, tmp_path, monkeypatch):
  start(config, tmp_path / "watched", [5.0, 2.0, 4.0, 3.0], monkeypatch)
  config.evaluation.during_training.every = 0
  train.train(config, str(tmp_path / "alone"))
  one, other = (pretrained.load(str(tmp_path / name)).params for name in ("watched", "alone"))
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, other)))


def test_samples_that_cannot_be_compared_end_no_run(config, tmp_path, monkeypatch, caplog):
  config.train.steps = 3
  known = comparison.Comparison(config.evaluation, shipped.digits(), None, 2)

  def failing(self, parts):
    raise RuntimeError("the device has no room")

  monkeypatch.setattr(comparison.Comparison, "scores", failing)
  assert train.train(config, str(tmp_path), None, known, samplers.Batching(2, jax.random.key(0), 4.0))
  assert "evaluation during training: the device has no room" in caplog.text
  assert not (tmp_path / "best.json").exists()


PROGRAM = """
import sys
import jax
from conftest import load_config

process, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, process)
from eqm_jax import programs

config = load_config("digits", "smoke")
config.model.update(width=16, depth=1, num_heads=2)
config.evaluation.pictured = "none"
config.evaluation.unit = 10
config.mesh.update(data=-1, fsdp=1)
programs.run("train", config, workdir, None)
"""


@pytest.mark.slow
def test_two_processes_judge_together(tmp_path):
  port = free_port()
  commands = [[sys.executable, "-c", PROGRAM, str(process), str(port), str(tmp_path)] for process in range(2)]
  running = [subprocess.Popen(one, env=environment(), stderr=subprocess.PIPE, text=True) for one in commands]
  for one in running:
    _, errors = one.communicate(timeout=400)
    assert one.returncode == 0, errors
  assert set(metrics(tmp_path)) == {30, 60}
  scores = json.loads((tmp_path / "best.json").read_text())["scores"]
  report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
  assert scores["60"]["raw"] == report["rows"]["adaptive"]["scores"]["raw"], "the same samples, drawn twice"


@pytest.mark.parametrize(
  "changes, text",
  [
    (dict(every=-1), "every = -1"),
    (dict(samples=1), "samples = 1"),
    (dict(sampler="best"), "sampler = 'best' is not one of the samplers: adaptive, gd, nag"),
  ],
)
def test_bad_numbers_are_refused(config, changes, text):
  config.evaluation.during_training.update(changes)
  with pytest.raises(ValueError, match=text):
    quality.check(config, DiT(**config.model), samplers.Batching(2, jax.random.key(0), 4.0))
