import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import environment, free_port
from PIL import Image

from eqm_jax.data import shipped
from eqm_jax.equilibrium import sampler
from eqm_jax.evaluation import agreement, comparison, evaluate, pictures, samplers, settings
from eqm_jax.evaluation.parts import Parts
from eqm_jax.networks.dit import DiT


@pytest.fixture
def batching():
  return samplers.Batching(2, jax.random.key(0), 4.0)


@pytest.fixture
def model_and_params(tiny_config):
  model = DiT(**tiny_config.model)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]
  # A new network answers zero: move it, so that samples move.
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)


def run(config, model, params, batching, directory, source=None):
  source = shipped.digits() if source is None else source
  settings.check_options(config, model, batching)
  settings.check_data(config, model, source, source, batching)
  known = comparison.Comparison(config.evaluation, source, source, 2)
  return evaluate.evaluate(config, model, params, known, batching, str(directory), {"checkpoint": "of a test"})


def test_real_samples_are_at_no_distance_from_themselves(
  tiny_config, model_and_params, batching, tmp_path, monkeypatch
):
  """Real images instead of samples: a distance of zero, and the classifier's own accuracy."""
  source = shipped.digits()

  def real_ones(name, row, model, params, label_N, batching, size, numbers):
    for number in numbers:
      index = np.arange(number * size, min((number + 1) * size, len(label_N)))
      images = np.stack([source.images[source.labels == label_N[i]][i // 10] for i in index])
      zeros = np.zeros(len(index), np.int32)
      yield number, samplers.Drawn(sampler.Result(images, zeros + 1, zeros, zeros, zeros), 1.0, len(index))

  monkeypatch.setattr(samplers, "draw_units", real_ones)
  tiny_config.evaluation.update(samples=1700, unit=300, rows=("gd",), pictured="none")
  report = run(tiny_config, *model_and_params, batching, tmp_path)
  for row in report["rows"].values():
    scores = row["scores"]["raw"]
    assert scores["frechet"] < 0.05 and scores["frechet_error"] < 0.05
    assert abs(scores["kernel_distance"]) < 0.01  # of noise it is above 0.1
    assert scores["precision"] > 0.95 and scores["recall"] > 0.95
    assert row["label_agreement"] > 0.98
    assert row["seconds"] == 6.0  # of six units
  assert 0.2 < report["features"]["raw"]["real"]["frechet_between_halves"] < 0.4
  assert 0.95 < report["features"]["label_agreement"]["classifier_accuracy"] <= 1


@pytest.mark.slow
def test_noise_is_far_from_the_digits_and_agrees_with_no_label(tiny_config, model_and_params, batching, tmp_path):
  for row in tiny_config.samplers.values():
    row.update(max_evaluations=1, threshold=0.0)
  tiny_config.evaluation.update(samples=100, features=("raw", "classifier"), rows=("gd",), pictured="none")
  tiny_config.evaluation.classifier.steps = 15
  report = run(tiny_config, *model_and_params, batching, tmp_path)
  for row in report["rows"].values():
    assert row["scores"]["raw"]["frechet"] > 5 and row["label_agreement"] < 0.3
    assert row["scores"]["raw"]["precision"] == 0
    classifier = row["scores"]["classifier"]
    assert classifier["frechet"] > 3 * report["features"]["classifier"]["real"]["frechet_between_halves"]
    assert classifier["spatial_frechet"] > 0 and 1 <= classifier["inception_score"] <= 10
    assert row["evaluations"]["mean"] == 1 and row["status"]["budget"] == 100
  table = (tmp_path / "evaluation.md").read_text()
  assert "Features: raw; 1797 real samples" in table and "Features: classifier (sha256" in table
  assert "| sampler | Fréchet | spatial Fréchet | inception score | kernel distance | precision | recall |" in table


def test_the_report_tells_all_that_a_number_depends_on(tiny_config, model_and_params, batching, tmp_path):
  tiny_config.evaluation.update(rows=("adaptive",), labels="random", seed=3, npz=True, unit=7)
  report = run(tiny_config, *model_and_params, batching, tmp_path)
  assert report["labels"] == "random" and report["seed"] == 3 and report["samples"] == 20
  assert report["weights"]["kind"] == "ema" and report["weights"]["checkpoint"] == "of a test"
  assert len(report["weights"]["sha256"]) == 64
  assert report["precision"] == {
    "network": "float32", "sampler": "float32", "features": "float32", "distances": "float64"
  }  # fmt: skip
  assert report["features"]["raw"]["name"] == "raw" and report["features"]["raw"]["real"]["samples"] == 1797
  assert set(report["versions"]) >= {"eqm_jax", "python", "jax", "jaxlib", "flax", "numpy"}
  assert set(report["rows"]) == {"adaptive"}
  row = report["rows"]["adaptive"]
  assert {"rule", "eta", "momentum", "guidance", "guidance_channels", "threshold", "streaming"} <= set(row)
  assert {"mean", "q0", "q10", "q50", "q90", "q100"} == set(row["evaluations"])
  # As ADM's evaluator reads it.
  with np.load(tmp_path / "adaptive.npz") as arrays:
    assert arrays["arr_0"].shape == (20, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["arr_1"], samplers.random_labels(20, 10, 3))
    drawn = samplers.draw(
      "adaptive", tiny_config.samplers.adaptive, *model_and_params, arrays["arr_1"], batching
    ).result.x
    difference = np.abs(arrays["arr_0"].astype(int) - pictures.to_uint8(drawn))
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.01  # rounding, where the batches differ
  assert not (tmp_path / "units").exists(), "what is done leaves no units behind"


def test_a_killed_evaluation_goes_on_where_it_was(tiny_config, model_and_params, batching, tmp_path, monkeypatch):
  tiny_config.evaluation.update(unit=4, rows=("adaptive", "nag"), pictured="none")
  expected = run(tiny_config, *model_and_params, batching, tmp_path / "whole")

  draw_units, drawn = samplers.draw_units, []

  def killed_in_the_second_row(name, *arguments):
    for unit in draw_units(name, *arguments):
      if (name, unit[0]) == ("nag", 2):
        raise KeyboardInterrupt
      yield unit

  def counted(*arguments):
    drawn.extend((arguments[0], number) for number in arguments[-1])
    return draw_units(*arguments)

  monkeypatch.setattr(samplers, "draw_units", killed_in_the_second_row)
  with pytest.raises(KeyboardInterrupt):
    run(tiny_config, *model_and_params, batching, tmp_path / "killed")
  monkeypatch.setattr(samplers, "draw_units", counted)
  resumed = run(tiny_config, *model_and_params, batching, tmp_path / "killed")
  assert drawn == [("nag", 2), ("nag", 3), ("nag", 4)]
  for name, row in expected["rows"].items():
    assert resumed["rows"][name]["scores"] == row["scores"], "the same bits"
    assert resumed["rows"][name]["evaluations"] == row["evaluations"]
  # Other weights are another series: nothing of the first is taken for it.
  model, params = model_and_params
  other = jax.tree.map(lambda leaf: leaf * 1.01, params)
  drawn.clear()
  run(tiny_config, model, other, batching, tmp_path / "killed")
  assert len(drawn) == 10


def test_another_machine_makes_another_series_and_comparable_scores(tiny_config, model_and_params, batching, tmp_path):
  known, row = comparison.Comparison(tiny_config.evaluation, shipped.digits(), None, 2), tiny_config.samplers.gd
  row.max_evaluations = 1
  settings_here = known.settings(row, batching)
  here = known.draw("gd", row, *model_and_params, np.arange(2), batching, str(tmp_path))
  known.computed_with = ["another processor"]
  there = known.draw("gd", row, *model_and_params, np.arange(2), batching, str(tmp_path))
  assert here.directory != there.directory and len(list(tmp_path.glob("gd-*/*.npz"))) == 2
  assert known.settings(row, batching) == settings_here, "what decides whether scores can be compared"


def test_decoded_samples_are_shown_as_images_in_units_of_any_size(
  tiny_config, model_and_params, batching, tmp_path, monkeypatch
):
  monkeypatch.setattr(comparison, "SHOWN", 10)
  decoding = dataclasses.replace(
    batching, decode=lambda x: np.zeros((len(x), 16, 16, 3), np.uint8) + 7, image_shape=(16, 16, 3)
  )
  tiny_config.evaluation.update(unit=4, rows=("gd",), pictured="none")
  run(tiny_config, *model_and_params, decoding, tmp_path)
  with Image.open(tmp_path / "samples_gd.png") as picture:
    assert np.unique(np.asarray(picture)).tolist() == [7, 255]


def test_a_damaged_unit_is_named(tiny_config, model_and_params, batching, tmp_path):
  tiny_config.evaluation.update(unit=10, rows=("gd",))
  known = comparison.Comparison(tiny_config.evaluation, shipped.digits(), None, 2)
  labels = samplers.balanced_labels(20, 10)
  series = known.draw("gd", tiny_config.samplers.gd, *model_and_params, labels, batching, str(tmp_path))
  file = sorted(tmp_path.rglob("*.npz"))[1]
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(ValueError, match="000001.npz: damaged .* Remove it"):
    known.scores(series)
  file.unlink()
  series = known.draw("gd", tiny_config.samplers.gd, *model_and_params, labels, batching, str(tmp_path))
  assert known.scores(series)["raw"]["frechet"] > 0


def test_units_that_no_other_process_has_made_are_told(tmp_path):
  series = Parts(str(tmp_path), "gd", {"seed": 0}, 20, 10)
  series.write(0, {"x": np.zeros(3)})
  with pytest.raises(ValueError, match="units of other processes are not there after 0 s: .* all processes share"):
    series.wait(0.0)


@pytest.mark.slow
def test_repeats_take_turns_and_integrators_have_rows(tiny_config, model_and_params, batching, tmp_path):
  tiny_config.samplers.nag.update(rule="heun", momentum=0.0, max_evaluations=4)
  tiny_config.evaluation.update(repeats=2, timed=("gd",), pictured="none")
  report = run(tiny_config, *model_and_params, batching, tmp_path)
  assert report["rows"]["nag"]["evaluations"]["mean"] == 4
  table = (tmp_path / "evaluation.md").read_text()
  assert "| nag | heun | – |" in table
  assert not (tmp_path / "descent.png").exists()


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda c: c.evaluation.update(pictured="heun"), "'heun' is not one of the samplers: adaptive, gd, nag"),
    (lambda c: c.samplers.adaptive.update(rule="heun"), "'adaptive' integrates"),
    (lambda c: c.evaluation.update(samples=1), "samples = 1"),
    (lambda c: c.evaluation.update(unit=0), "unit = 0"),
    (lambda c: c.evaluation.update(labels="some"), "labels = 'some' is not one of balanced, random"),
    (lambda c: c.evaluation.update(rows=("best",)), "rows: 'best'"),
    (
      lambda c: c.evaluation.update(features=("fid",)),
      r"features = \('fid',\): name some of raw, classifier, inception",
    ),
    (lambda c: c.evaluation.update(features=()), "features"),
    (lambda c: c.evaluation.update(features=("inception",)), "inception.path = .* no such file. Fetch pt_inception"),
    (lambda c: c.evaluation.update(repeats=0), "repeats = 0"),
    (lambda c: c.evaluation.update(timed=("fast",)), "'fast'"),
    (lambda c: c.evaluation.update(weights="best"), "'best'"),
    (lambda c: c.samplers.gd.update(step_size=-1.0), "samplers.gd: step_size = -1.0"),
  ],
)
def test_bad_options_are_refused(tiny_config, model_and_params, batching, change, text):
  change(tiny_config)
  with pytest.raises(ValueError, match=text):
    settings.check_options(tiny_config, model_and_params[0], batching)


@pytest.mark.parametrize(
  "changes, text",
  [
    (dict(dtype="bfloat16"), "dtype = 'bfloat16': reported numbers are computed in float32"),
    (dict(resize="bicubic"), "resize = 'bicubic' is not one of tf1, half_pixel"),
    (dict(batch_size=0), "inception.batch_size = 0"),
  ],
)
def test_bad_inception_options_are_refused(tiny_config, model_and_params, batching, changes, text):
  tiny_config.evaluation.features = ("inception",)
  tiny_config.evaluation.inception.update(path=__file__, **changes)
  with pytest.raises(ValueError, match=text):
    settings.check_options(tiny_config, model_and_params[0], batching)


def test_data_that_samples_cannot_be_compared_with_is_refused(tiny_config, model_and_params, batching, tmp_path):
  model, params = model_and_params
  with pytest.raises(ValueError, match="cannot be compared"):
    run(tiny_config, model.clone(num_classes=9), params, batching, tmp_path)
  digits, photographs = shipped.digits(), shipped.photographs(size=8)
  tiny_config.evaluation.features = ("inception",)
  with pytest.raises(ValueError, match=r"takes RGB images, but the samples are \(8, 8, 1\): name 'classifier'"):
    settings.check_data(tiny_config, model, None, None, batching)
  tiny_config.evaluation.features = ("classifier",)
  with pytest.raises(ValueError, match=r"fitted to images \(8, 8, 3\), but the samples are \(8, 8, 1\)"):
    settings.check_data(tiny_config, model, digits, photographs, batching)
  # Latents that are decoded are judged by what they decode to.
  latents = model.clone(channels=4)
  decoding = dataclasses.replace(batching, image_shape=(8, 8, 3))
  settings.check_data(tiny_config, latents, None, photographs, decoding)
  tiny_config.evaluation.update(features=("raw",), npz=True)
  with pytest.raises(ValueError, match=r"npz = True, but the samples are \(8, 8, 4\), no images"):
    settings.check_data(tiny_config, latents, None, None, batching)


def seven_of_ten_not_finite(x: np.ndarray) -> np.ndarray:
  return np.where(np.arange(len(x))[:, None, None, None] < 7, np.nan, x)


@pytest.mark.parametrize(
  "name, spoil, text",
  [
    ("raw", seven_of_ten_not_finite, "samplers.gd: 14 of 20 samples are not"),
    ("classifier", np.zeros_like, "samplers.gd: the samples: all rows are the same"),
    pytest.param("raw", np.zeros_like, "samplers.gd: the samples: all rows are the same", marks=pytest.mark.slow),
    pytest.param(
      "classifier", seven_of_ten_not_finite, "samplers.gd: 14 of 20 samples are not", marks=pytest.mark.slow
    ),
  ],
)
def test_samples_that_cannot_be_compared_are_told(
  tiny_config, model_and_params, batching, tmp_path, name, spoil, text, monkeypatch
):
  draw_units = samplers.draw_units

  def spoiled(*arguments):
    for number, drawn in draw_units(*arguments):
      yield number, dataclasses.replace(drawn, result=drawn.result.replace(x=spoil(drawn.result.x)))

  monkeypatch.setattr(samplers, "draw_units", spoiled)
  tiny_config.evaluation.update(rows=("gd",), pictured="none", label_agreement=False, features=(name,), unit=10)
  tiny_config.evaluation.classifier.steps = 1
  with pytest.raises(ValueError, match=text):
    run(tiny_config, *model_and_params, batching, tmp_path)


# An evaluation on some number of pretended devices, or by one of several processes, and what came out.
PROGRAM = """
import json, sys
import jax, numpy as np
from conftest import load_config

directory, process, processes, port = sys.argv[1], *map(int, sys.argv[2:])
if processes > 1:
  jax.distributed.initialize(f"localhost:{port}", processes, process)

from eqm_jax import devices
from eqm_jax.data import shipped
from eqm_jax.evaluation import comparison, evaluate, samplers
from eqm_jax.networks.dit import DiT

config = load_config("digits", "smoke")
config.model.update(patch_size=2, width=16, depth=2, num_heads=2)
config.evaluation.update(
  samples=90, batch_size=4, unit=10, features=("raw", "classifier"), rows=("adaptive", "nag"), pictured="none"
)
config.evaluation.classifier.steps = 8
config.samplers.adaptive.threshold = 84.0
config.samplers.nag.streaming = False
model = DiT(**config.model)
params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 1)), np.zeros(1, np.int32))["params"]
rng = np.random.default_rng(0)
params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), jax.device_get(params))
source = shipped.digits()
known = comparison.Comparison(config.evaluation, source, source, 1)
report = evaluate.evaluate(config, model, params, known, samplers.Batching(4, jax.random.key(0), 4.0), directory, {})
third = devices.from_all(np.asarray([1 / 3 + process, 1e300]))
assert devices.from_all(np.asarray(1.5)).shape == (processes,)
json.dump({"devices": jax.device_count(), "report": report, "third": third.tolist()}, sys.stdout)
"""


# Over how many threads XLA splits a product on a CPU decides the bits of the classifier that is fitted. Otherwise there
# would be one for each core, but with eight pretended devices at least eight.
THREADS = 8


def start(directory, *, devices: int = 1, process: int = 0, processes: int = 1, port: int = 0) -> subprocess.Popen:
  command = [sys.executable, "-c", PROGRAM, str(directory), *map(str, (process, processes, port))]
  variables = environment(devices, NPROC=str(THREADS))
  return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict:
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  return json.loads(output.splitlines()[-1])  # gloo writes a line of its own before


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory) -> dict:
  return finish(start(tmp_path_factory.mktemp("one")))["report"]


def assert_same_to_rounding(report: dict, expected: dict):
  evaluations = expected["rows"]["adaptive"]["evaluations"]
  assert evaluations["q0"] < evaluations["q100"], "the samples should differ"
  assert report["features"] == expected["features"] and report["computed_with"] == expected["computed_with"]
  for name, row in expected["rows"].items():
    other = report["rows"][name]
    for space, scores in row["scores"].items():
      assert other["scores"][space] == pytest.approx(scores, rel=1e-5, abs=1e-6, nan_ok=True), (name, space)
    assert row["evaluations"] == other["evaluations"] and row["label_agreement"] == other["label_agreement"]


@pytest.mark.slow
def test_one_device_and_eight_give_the_same_to_rounding(tmp_path, on_one_device):
  found = finish(start(tmp_path, devices=8))
  assert found["devices"] == 8
  assert_same_to_rounding(found["report"], on_one_device)


@pytest.mark.slow
def test_two_processes_share_the_samples_and_give_the_same_to_rounding(tmp_path, on_one_device):
  port = free_port()
  both = [start(tmp_path, process=process, processes=2, port=port) for process in range(2)]
  first, second = (finish(process) for process in both)
  assert first["devices"] == 2 and second["report"] is None
  assert first["third"] == second["third"] == [[1 / 3, 1e300], [1 / 3 + 1, 1e300]], "float64, unrounded"
  assert_same_to_rounding(first["report"], on_one_device)


def test_the_classifier_knows_digits_and_not_shuffled_labels():
  source = shipped.digits()
  classifier = agreement.Classifier(source.images, source.labels)
  assert classifier.held_out_accuracy > 0.97
  assert classifier.agreement(source.images, (source.labels + 1) % 10) < 0.02
