"""The command line: help, results, and mistakes that are refused in one line before anything is compiled."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT, load_config

import eqm_jax
from eqm_jax import experiments, main, modes

TINY = [
  "--config=configs/digits.py:smoke",
  "--config.model.width=16",
  "--config.model.depth=1",
  "--config.model.num_heads=2",
  "--config.train.steps=4",
  "--config.train.batch_size=8",
  "--config.optimizer.warmup_steps=1",
  "--config.evaluation.num_samples=10",
  "--config.evaluation.batch_size=2",
  "--config.sample.batch_size=2",
]


def run(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "eqm_jax.main", *arguments]
  env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as in a notebook's terminal
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("main") / "run"
  finished = run(*TINY, f"--workdir={workdir}")
  assert finished.returncode == 0, finished.stderr
  return workdir


def test_help_lists_the_modes_without_config_and_workdir(monkeypatch):
  monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # which lacks the table's lines
  finished = run("--mode=help")
  assert finished.returncode == 0, finished.stderr
  for name in modes.NAMES:
    mode = modes.declaration(name)
    assert f" {name} " in finished.stdout
    words = f"{mode.summary} {mode.writes}".encode("ascii", "replace").decode().split()  # lines are wrapped
    assert all(word in finished.stdout for word in words)


def test_help_explains_the_flags():
  finished = run("--help")
  assert "--mode: <prepare|train|" in finished.stdout and "configs/base.py documents them all" in finished.stdout


def test_config_and_workdir_are_required():
  finished = run("--config=configs/digits.py:smoke")
  assert finished.returncode == 1 and "error: --workdir missing: --mode=train needs" in finished.stderr


def test_a_run_writes_what_it_promises(trained):
  report = json.loads((trained / "evaluation" / "evaluation.json").read_text())
  assert set(report["rows"]) == {"gd", "nag", "adaptive"}
  for name in (
    "samples_gd.png",
    "samples_nag.png",
    "samples_adaptive.png",
    "descent.png",
    "descent.gif",
    "nfe_adaptive.png",
    "samples_gd.html",
    "../report.html",
  ):
    assert (trained / "evaluation" / name).stat().st_size > 100
  steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
  assert steps == [1, 4]
  assert list((trained / "tensorboard").iterdir())


@pytest.mark.slow
def test_evaluating_again_with_another_sampler_needs_no_training(trained):
  finished = run(*TINY, f"--workdir={trained}", "--mode=evaluate", "--config.samplers.gd.max_nfe=3")
  assert finished.returncode == 0, finished.stderr
  report = json.loads((trained / "evaluation" / "evaluation.json").read_text())
  assert report["rows"]["gd"]["nfe"]["mean"] == 3
  assert "step 1/" not in finished.stderr


@pytest.mark.slow
def test_samples_go_to_files(trained):
  asked = ["--config.sample.num_samples=5", "--config.sample.labels=3,7-8", "--config.sample.save_images=True"]
  row = "--config.samplers.adaptive."
  asked += [row + "guidance=1.5", row + "guidance_channels=1", row + "guidance_interval=(1.0,100.0)", row + "rule=nag"]
  asked.append(row + "momentum=0.3")
  finished = run(*TINY, f"--workdir={trained}", "--mode=sample", *asked)
  assert finished.returncode == 0, finished.stderr
  assert "images/s" in finished.stderr and "NFE" in finished.stderr
  directory = trained / "samples"
  names = sorted(path.name for path in (directory / "images").iterdir())
  assert names == ["000000_3.png", "000001_7.png", "000002_8.png", "000003_3.png", "000004_7.png"]
  arrays = np.load(directory / "samples.npz")
  assert arrays["x"].shape == (5, 8, 8, 1) and arrays["label"].tolist() == [3, 7, 8, 3, 7]
  for name in ("samples.png", "samples.html", "descent.png", "descent.gif", "norms.png"):
    assert (directory / name).stat().st_size > 100


@pytest.mark.slow
def test_the_authors_checkpoint_can_be_sampled(tmp_path):
  pretrained = eqm_jax.load(ROOT / "tests" / "reference" / "eqm_tiny.pt", num_heads=4)
  eqm_jax.export_reference(tmp_path / "tiny.pt", pretrained.model, pretrained.params)
  flags = [f"--checkpoint={tmp_path / 'tiny.pt'}", "--config.sample.num_samples=3", f"--workdir={tmp_path}"]
  finished = run(*TINY, "--mode=sample", *flags)
  assert finished.returncode == 0, finished.stderr
  assert np.load(tmp_path / "samples" / "samples.npz")["x"].shape == (3, 8, 8, 4)


@pytest.mark.slow
def test_another_config_on_the_same_workdir_is_refused(trained):
  finished = run(*TINY, f"--workdir={trained}", "--config.objective.schedule.multiplier=2.0")
  assert finished.returncode == 1
  assert "objective.schedule.multiplier: 4.0 in the workdir, 2.0 in this config" in finished.stderr


@pytest.mark.parametrize(
  "arguments, text",
  [
    (["--config.model.dpeth=3"], "Did you mean depth"),
    (["--config.samplers.gd.max_evaluations=3"], "samplers.gd.max_evaluations: there is no key"),
    pytest.param(["--config.modle.depth=3"], "Did you mean model", marks=pytest.mark.slow),
    pytest.param(["--config.model.depth=three"], "three", marks=pytest.mark.slow),
    (["--mode=dream"], "dream"),
    pytest.param(["stray"], "stray", marks=pytest.mark.slow),
    pytest.param(["--config.data.source=cifar"], "must be one of digits, mnist", marks=pytest.mark.slow),
    pytest.param(
      ["--config.model.patch_size=3"], "patch_size = 3 does not divide model.input_size = 8", marks=pytest.mark.slow
    ),
    pytest.param(["--config.mesh.data=3"], "there are 1", marks=pytest.mark.slow),
    (["--mode=evaluate", "--checkpoint=nowhere"], "nowhere: no such model"),
    pytest.param(
      ["--mode=sample", "--checkpoint=nowhere", "--config.sample.sampler=best"],
      "nowhere: no such model",
      marks=pytest.mark.slow,
    ),
    pytest.param(["--config.samplers.gd.step_size=-1.0"], "samplers.gd: step_size = -1.0", marks=pytest.mark.slow),
    pytest.param(["--config.evaluation.plot_sampler=best"], "evaluation.plot_sampler = 'best'", marks=pytest.mark.slow),
    pytest.param(
      ["--config.model.time_input=True", "--config.objective.kind=flow_matching"],
      "evaluation.num_samples = None",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      ["--checkpoint=x.pt"],
      "--checkpoint=x.pt: --mode=train takes no checkpoint: training resumes",
      marks=pytest.mark.slow,
    ),
    pytest.param(["--config.data.source=latents"], "it takes path, verify", marks=pytest.mark.slow),
  ],
)
def test_mistakes_are_refused_in_one_line(tmp_path, arguments, text):
  finished = run(*TINY, f"--workdir={tmp_path / 'run'}", *arguments)
  assert finished.returncode != 0
  assert text in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.parametrize("flag", [["--config=NAME"], ["-config=NAME"], ["--config", "NAME"]])
def test_configs_are_found_by_name(tmp_path, monkeypatch, flag):
  monkeypatch.chdir(tmp_path)
  rest = ["--workdir=digits", "--mode", "train", "--config.data.source=digits"]
  for name in ("digits:smoke", "configs/digits.py:smoke"):
    argv = ["main", *(part.replace("NAME", name) for part in flag), *rest]
    expected = [part.replace("NAME", f"{ROOT / 'configs' / 'digits.py'}:smoke") for part in flag]
    assert main._with_path(argv) == ["main", *expected, *rest]


def test_a_missing_config_is_refused(tmp_path):
  finished = run("--config=configs/nothing.py", f"--workdir={tmp_path}")
  assert finished.returncode != 0
  assert finished.stderr.startswith("error: config configs/nothing.py: there is no such file: give a path, or")


def test_keys_that_may_be_none_take_it():
  config = load_config("digits")
  experiments.set_value(config, "evaluation.num_samples", None)
  assert config.evaluation.num_samples is None
  with pytest.raises(ValueError, match="train.steps = None must be a value"):
    experiments.set_value(config, "train.steps", None)


def test_a_notebook_is_told_what_to_call_instead(monkeypatch):
  monkeypatch.setitem(
    sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1))
  )
  monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
  with pytest.raises(ValueError, match=r"in place of .*eqm_jax.run\('train', eqm_jax.config\('digits'\)"):
    main.run()
