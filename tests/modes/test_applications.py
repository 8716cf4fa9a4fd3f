"""The modes that use a landscape: what they write, and what they refuse."""

import json
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
from conftest import load_config
from PIL import Image

import eqm_jax
from eqm_jax import modes, plotting
from eqm_jax.data import builtin, samples
from eqm_jax.evaluation import outliers
from eqm_jax.modes import compose, inpaint
from eqm_jax.networks.dit import DiT
from eqm_jax.training.state import stream_key


def small_config(energy: str = "none"):
  config = load_config("digits", "smoke")
  config.model.update(width=16, depth=1, num_heads=2, energy=energy)
  config.train.update(steps=40, batch_size=32)
  config.checkpoint.every = 40
  config.evaluation.update(num_samples=20, batch_size=2)
  config.tasks.update(num_images=12, batch_size=8, labels="own")
  config.tasks.inpaint.update(settle=3, tries=2)
  return config


@pytest.fixture(scope="module", params=["none", pytest.param("dot", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
  """(workdir, config) of a trained network, one implicit and one an energy."""
  workdir, config = tmp_path_factory.mktemp(request.param), small_config(request.param)
  modes.run("train", config, str(workdir))
  return workdir, config


@pytest.fixture
def config(run):
  return run[1].copy_and_resolve_references()


def test_a_run_ends_with_its_evaluation_and_can_be_sampled(run, config):
  """For an energy as for a field: samples and pictures follow the gradient."""
  report = json.loads((run[0] / "evaluation" / "evaluation.json").read_text())
  assert set(report["rows"]) == set(config.samplers) and (run[0] / "evaluation" / "descent.png").exists()
  config.sample.update(num_samples=4, batch_size=2)
  modes.run("sample", config, str(run[0]))
  x = np.load(run[0] / "samples" / "samples.npz")["x"]
  pretrained, row = eqm_jax.load(run[0]), config.samplers.adaptive
  noise = eqm_jax.start_noise(stream_key(config.sample.seed, "samples"), np.arange(4), (8, 8, 1))
  expected = eqm_jax.descend(
    eqm_jax.field(pretrained.model, pretrained.params, np.arange(4)), noise, step_size=row.step_size, rule=row.rule,
    max_nfe=row.max_nfe, threshold=row.threshold,
  )  # fmt: skip
  np.testing.assert_allclose(x, expected.x, atol=1e-4)


def spread_digits(count: int) -> np.ndarray:
  source = builtin.digits()
  return source.images[samples.spread(source, count)]


def written(workdir: pathlib.Path, mode: str) -> dict:
  assert Image.open(workdir / mode / f"{mode}.png").size[0] > 100
  return json.loads((workdir / mode / f"{mode}.json").read_text())


def test_denoise(run, config):
  config.tasks.denoise.gammas = (0.2, 0.9)
  modes.run("denoise", config, str(run[0]))
  rows = written(run[0], "denoise")["rows"]
  assert list(rows) == ["0.2", "0.9"] and rows["0.2"]["mean_square_before"] > rows["0.9"]["mean_square_before"]
  # Before the descent the mean squared error at γ is (1−γ)²·(1 + the mean square of the images).
  image = spread_digits(12)
  np.testing.assert_allclose(rows["0.2"]["mean_square_before"], 0.64 * (1 + np.mean(image**2)), rtol=0.1)
  assert np.load(run[0] / "denoise" / "denoised.npz")["gamma_0.9"].shape == (12, 8, 8, 1)


@pytest.mark.parametrize("run", ["none"], indirect=True)
def test_denoise_images_that_are_noisy_already(run, config, tmp_path):
  """At an unknown level, with values far beyond [−1, 1]: each image ends where `descend` alone takes it."""
  start = 2 * np.random.default_rng(0).normal(size=(3, 8, 8, 1))
  np.savez(tmp_path / "noisy.npz", x=start)
  config.tasks.update(images=str(tmp_path / "noisy.npz"), labels="none")
  config.tasks.denoise.gammas = None
  modes.run("denoise", config, str(run[0]))
  assert set(written(run[0], "denoise")["rows"]["unknown"]) == {"nfe", "norm"}
  denoised = np.load(run[0] / "denoise" / "denoised.npz")["gamma_unknown"]
  pretrained = eqm_jax.load(run[0])
  row = config.samplers.adaptive
  expected = eqm_jax.descend(
    eqm_jax.field(pretrained.model, pretrained.params, np.full(3, 10)), start.astype(np.float32),
    step_size=row.step_size, rule=row.rule, max_nfe=row.max_nfe, threshold=row.threshold,
  )  # fmt: skip
  np.testing.assert_allclose(denoised, expected.x, atol=1e-4)


def test_ood(run, config, tmp_path):
  np.savez(tmp_path / "white.npz", x=np.full((5, 8, 8, 1), 255, np.uint8))
  config.tasks.images = str(tmp_path / "white.npz")
  config.tasks.labels = "none"
  config.tasks.num_images = 200
  config.tasks.ood.scores = ("norm", "mahalanobis") + (("energy",) if config.model.energy == "dot" else ())
  modes.run("ood", config, str(run[0]))
  aurocs = written(run[0], "ood")["auroc"]
  kinds = {*outliers.MAKERS, "images", "mean"}
  assert all(set(by_kind) == kinds for by_kind in aurocs.values()) and set(aurocs) == set(config.tasks.ood.scores)
  assert aurocs["mahalanobis"]["uniform"] > 0.95 and aurocs["mahalanobis"]["images"] > 0.95
  scores = np.load(run[0] / "ood" / "scores.npz")
  assert scores["norm_data"].shape == (200,) and scores["norm_images"].shape == (5,)
  pretrained = eqm_jax.load(run[0])
  field = eqm_jax.field(pretrained.model, pretrained.params)
  x = spread_digits(200)[:3]
  expected = np.linalg.norm(jax.jit(field.__call__)(x, np.full(3, 10)).reshape(3, -1), axis=1)
  np.testing.assert_allclose(scores["norm_data"][:3], expected, rtol=1e-4)
  if config.model.energy == "dot":
    energy = eqm_jax.energy(pretrained.model, pretrained.params, np.full(3, 10))
    np.testing.assert_allclose(scores["energy_data"][:3], energy(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("run", ["none"], indirect=True)
def test_compose_labels_and_models(run, config, tmp_path):
  """Two labels of one model in one sum are what guidance with two conditions gives."""
  config.tasks.compose.update(labels=(3, 8), weights=(1.5, -0.7), checkpoints=(None, str(run[0])))
  modes.run("compose", config, str(run[0]))
  report = written(run[0], "compose")
  assert [term["weight"] for term in report["terms"]] == [1.5, -0.7]
  assert abs(sum(report["classified_as"].values()) - 1) < 1e-6
  x = np.load(run[0] / "compose" / "compose.npz")["x"]
  pretrained, row = eqm_jax.load(run[0]), config.samplers.adaptive
  guidance = np.array([1.5, -0.7], np.float32)
  field = eqm_jax.field(pretrained.model, pretrained.params, np.tile([3, 8], (12, 1)), guidance=guidance)
  noise = eqm_jax.start_noise(stream_key(config.tasks.seed, "samples"), np.arange(12), (8, 8, 1))
  expected = eqm_jax.descend(
    field, noise, step_size=row.step_size, rule=row.rule,
    max_nfe=row.max_nfe, threshold=row.threshold,
  )  # fmt: skip
  np.testing.assert_allclose(x, expected.x, atol=1e-3)


@pytest.mark.parametrize("run", ["none"], indirect=True)
def test_readout(run, config, tmp_path):
  config.tasks.readout.num_samples = 600
  modes.run("readout", config, str(run[0]))
  report = written(run[0], "readout")
  predictions = np.load(run[0] / "readout" / "predictions.npz")
  error = predictions["network"] - predictions["gamma"]
  assert len(error) == 100 and report["network"]["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)
  assert report["network"]["rmse"] < report["pixel statistics"]["rmse"]
  config.samplers.adaptive.update(stop="gamma", threshold=0.6, readout=str(run[0] / "readout" / "readout.npz"))
  for mode in ("compose", "inpaint"):
    with pytest.raises(ValueError, match=f"adaptive.stop = 'gamma' must be one of norm: --mode={mode} takes no other"):
      modes.run(mode, config, str(tmp_path), str(run[0]))
  with pytest.raises(ValueError, match="adaptive.stop = 'gamma' needs a read-out of weights that are still"):
    modes.run("train", config, str(tmp_path / "new"))
  config.evaluation.update(samplers=("gd",), plot_sampler="adaptive")
  config.evaluation.during_training.every = None
  with pytest.raises(ValueError, match="still to be trained: name another sampler in evaluation.plot_sampler, and"):
    modes.run("train", config, str(tmp_path / "new"))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["none"], indirect=True)
def test_samples_that_stop_by_a_readout(run, config, tmp_path):
  config.tasks.readout.num_samples = 600
  modes.run("readout", config, str(tmp_path), str(run[0]))
  path = str(tmp_path / "readout" / "readout.npz")
  config.samplers.adaptive.update(stop="gamma", threshold=0.6, readout=path)
  config.sample.update(num_samples=4, batch_size=2)
  modes.run("sample", config, str(tmp_path), str(run[0]))
  arrays = np.load(tmp_path / "samples" / "samples.npz")
  pretrained, row = eqm_jax.load(run[0]), config.samplers.adaptive
  readout = eqm_jax.load_readout(path, pretrained.model, pretrained.params)
  noise = eqm_jax.start_noise(stream_key(config.sample.seed, "samples"), np.arange(4), (8, 8, 1))
  expected = eqm_jax.descend(
    pretrained.field(np.arange(4), readout=readout), noise, step_size=row.step_size, max_nfe=row.max_nfe,
    threshold=0.6, stop="gamma",
  )  # fmt: skip
  np.testing.assert_allclose(arrays["x"], expected.x, atol=1e-4)
  np.testing.assert_allclose(arrays["gamma"], expected.gamma, atol=1e-4)
  config.evaluation.samplers = ("adaptive",)
  modes.run("evaluate", config, str(tmp_path), str(run[0]))
  row = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["rows"]["adaptive"]
  assert (row["stop"], row["readout"]) == ("gamma", path) and (tmp_path / "evaluation" / "nfe_adaptive.png").exists()


def test_a_readout_needs_an_implicit_model_and_images(tmp_path):
  config = small_config("dot")
  model = DiT(**config.model)
  params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32), np.zeros(1, int))["params"]
  eqm_jax.save_pretrained(tmp_path / "energy", model, params)
  with pytest.raises(ValueError, match="this one is the gradient of an energy"):
    modes.run("readout", config, str(tmp_path / "run"), str(tmp_path / "energy"))
  np.savez(tmp_path / "few.npz", image=np.zeros((5, 8, 8, 1), np.uint8), label=np.arange(5))
  config.data.source = "npz"
  config.data.options = ml_collections.ConfigDict({"path": str(tmp_path / "few.npz"), "num_classes": 10})
  eqm_jax.save_pretrained(tmp_path / "implicit", model.clone(energy="none"), params)
  with pytest.raises(ValueError, match="'npz' has 5 images, and one in 6 is held out: give more"):
    modes.run("readout", config, str(tmp_path / "run"), str(tmp_path / "implicit"))


@pytest.mark.parametrize("run", ["none"], indirect=True)
def test_inpaint(run, config, tmp_path):
  mask = np.zeros((8, 8))
  mask[2:5, 2:] = 1
  np.save(tmp_path / "mask.npy", mask)
  for name in ("bottom", str(tmp_path / "mask.npy")):
    config.tasks.inpaint.mask = name
    modes.run("inpaint", config, str(run[0]))
    report = written(run[0], "inpaint")
    arrays = np.load(run[0] / "inpaint" / "inpainted.npz")
    kept = np.broadcast_to(arrays["mask"] == 0, arrays["x"].shape)
    assert report["painted_fraction"] == pytest.approx(1 - kept.mean())
    np.testing.assert_array_equal(arrays["x"][kept], spread_digits(12)[kept])
    assert not np.allclose(arrays["x"][~kept], spread_digits(12)[~kept], atol=0.1)


BAD = {
  "denoise": [
    ({"denoise.gammas": (0.5, 1.5)}, "gamma = 1.5"),
    ({"denoise.gammas": ()}, "must name at least one γ"),
    ({"sampler": "none"}, "tasks.sampler = 'none' must be one of adaptive, gd, nag"),
  ],
  "ood": [
    ({"ood.scores": ("likelihood",)}, "'likelihood' must be one of norm, energy, mahalanobis"),
    ({"ood.against": ("cats",)}, "'cats' must be one of uniform"),
    ({"ood.against": ()}, r"tasks.ood.against = \(\): name at least one"),
    ({"num_images": 0}, "tasks.num_images = 0"),
  ],
  "readout": [
    ({"readout.num_samples": 50}, "tasks.readout.num_samples = 50 must be at least 60"),
    ({"readout.ridge": 0.0}, r"tasks.readout.ridge = 0.0 must be in \(0"),
    ({"images": "/nowhere"}, "/nowhere: no such folder"),
  ],
  "compose": [
    ({"compose.weights": (1.0,)}, "'weights': 1"),
    ({"compose.weights": (1.0, float("inf"))}, "not all finite"),
    ({"compose.labels": (3, 12)}, "3..12"),
    ({"num_images": 0}, "tasks.num_images = 0"),
    ({"batch_size": 0}, "tasks.batch_size = 0"),
    ({"compose.checkpoints": (None, "/nowhere")}, "/nowhere: no such model"),
  ],
  "inpaint": [
    ({"inpaint.mask": "middle"}, "'middle' is unknown: give left, right"),
    ({"inpaint.mask": "/nowhere.npy"}, "tasks.inpaint.mask: /nowhere.npy: no such .npz or .npy"),
    ({"inpaint.gamma": -1.0}, "gamma = -1"),
    ({"images": "/nowhere"}, "/nowhere: no such folder"),
    ({"labels": "cat"}, "tasks.labels = 'cat'"),
    ({"sampler": "best"}, "tasks.sampler = 'best' must be one of adaptive, gd, nag: it names a sampler"),
  ],
}


@pytest.fixture(scope="module")
def sorted_folder(tmp_path_factory) -> pathlib.Path:
  """Six digits of each class, in a folder for each class, as ImageNet lies on a disk."""
  directory, digits = tmp_path_factory.mktemp("sorted"), builtin.digits()
  for label in range(10):
    (directory / str(label)).mkdir()
    for i, image in enumerate(digits.images[digits.labels == label][:6]):
      pixels = np.rint(127.5 * image[..., 0] + 127.5).astype(np.uint8)
      Image.fromarray(pixels).save(directory / str(label) / f"{i}.png")
  return directory


@pytest.mark.parametrize("run", ["none"], indirect=True)
@pytest.mark.parametrize("mode", ["denoise", "ood", "inpaint", "compose"])
def test_a_folder_sorted_by_class_is_seen_as_a_whole(run, config, mode, sorted_folder, monkeypatch, tmp_path):
  """Whatever a mode takes of the data set, ten images or all, has as many of each class."""
  config.data.source = "folder"
  config.data.options = ml_collections.ConfigDict({"path": str(sorted_folder), "size": 8, "channels": 1})
  config.tasks.num_images = 10
  config.tasks.denoise.gammas = (0.5,)
  config.tasks.ood.update(scores=("norm", "mahalanobis"), against=("uniform",))
  taken, read = [], samples.arrays_and_labels  # which `samples.arrays` calls, too

  def recorded(source, indices, *arguments):
    taken.append(np.bincount(source.labels[np.asarray(indices)], minlength=10))
    return read(source, indices, *arguments)

  monkeypatch.setattr(samples, "arrays_and_labels", recorded)
  modes.run(mode, config, str(tmp_path), str(run[0]))
  counts = {"denoise": [1], "ood": [1, 6], "inpaint": [1, 6], "compose": [6]}  # of each class, in the order of calls
  np.testing.assert_array_equal(taken, [[count] * 10 for count in counts[mode]])
  if mode == "inpaint":
    assert np.load(tmp_path / "inpaint" / "inpainted.npz")["label"].tolist() == list(range(10))
  if mode == "compose":
    assert len(json.loads((tmp_path / "compose" / "compose.json").read_text())["classified_as"]) == 10


@pytest.mark.slow
def test_classes_of_a_folder_are_named_beside_their_labels(tiny_config, tmp_path, caplog):
  """Label 1 is the folder "10": in the log, the workdir, the pages and the pictures."""
  for name in ("1", "2", "10", ".ipynb_checkpoints"):
    (tmp_path / "images" / name).mkdir(parents=True)
    for i in range(8):
      pixels = np.full((8, 8), 16 * i, np.uint8)
      Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
  config, workdir = tiny_config, tmp_path / "run"
  config.data.source = "folder"
  config.data.options = ml_collections.ConfigDict({"path": str(tmp_path / "images"), "size": 8, "channels": 1})
  config.evaluation.num_samples = None
  caplog.set_level("INFO", "eqm_jax")
  with pytest.raises(ValueError, match=r"num_classes = 10, but 'folder' has 3 classes \(1, 10, 2\): they must be the"):
    modes.run("train", config, str(workdir))
  config.model.num_classes = 3
  config.train.steps = 4
  config.evaluation.update(num_samples=6, classifier_accuracy=False)
  config.sample.update(num_samples=6, batch_size=2)
  config.tasks.update(num_images=6, batch_size=2)
  config.tasks.compose.labels = (0, 1)
  for mode in ("train", "sample", "compose"):
    modes.run(mode, config, str(workdir))
  listed = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
  assert len(listed) == 1 and listed[0].endswith(
    "images: 24 images in 3 classes (1, 10, 2), which text sorts unlike numbers: label 1 is 10; left out 1: hidden 1 "
    "(.ipynb_checkpoints/)"
  )
  assert eqm_jax.load(workdir).class_names == ("1", "10", "2")
  compose = json.loads((workdir / "compose" / "compose.json").read_text())
  assert [term["class"] for term in compose["terms"]] == ["0 (1)", "1 (10)"]
  for page in ("samples/samples.html", "evaluation/samples_gd.html"):
    assert "<b>1 (10)</b>" in (workdir / page).read_text()
  rows = {"samples/samples.png": 1, "evaluation/samples_gd.png": 1, "samples/descent.png": 6, "compose/compose.png": 3}
  for picture, count in rows.items():
    with Image.open(workdir / picture) as image:
      assert image.height == (9 * count + 1) * 8 + count * plotting.CAPTION_HEIGHT, picture


@pytest.mark.parametrize("run", ["none"], indirect=True)
@pytest.mark.parametrize("mode, changes, message", [(mode, *case) for mode, cases in BAD.items() for case in cases])
def test_bad_input_is_refused(run, mode, changes, message):
  config = run[1].copy_and_resolve_references()
  config.tasks.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    modes.run(mode, config, str(run[0]))


@pytest.mark.parametrize("run", ["none"], indirect=True)
def test_an_energy_of_an_implicit_model_is_refused(run):
  config = run[1].copy_and_resolve_references()
  config.tasks.ood.scores = ("energy",)
  with pytest.raises(ValueError, match="implicit.*‖f‖"):
    modes.run("ood", config, str(run[0]))


@pytest.mark.parametrize("run", ["none"], indirect=True)
def test_labels_that_the_model_does_not_know_are_refused(run, tmp_path):
  np.savez(tmp_path / "a.npz", x=np.zeros((2, 8, 8, 1), np.uint8), label=np.array([3, 12]))
  config = run[1].copy_and_resolve_references()
  config.tasks.images = str(tmp_path / "a.npz")
  with pytest.raises(ValueError, match=r"labels span 3\.\.12"):
    modes.run("inpaint", config, str(run[0]))


def test_a_network_that_takes_the_time_is_refused(tmp_path):
  config = load_config("digits", "flow_matching")
  config.model.update(width=16, depth=1, num_heads=2)
  model = DiT(**config.model)
  init = jax.jit(model.init)
  params = init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32), np.zeros(1, int), np.zeros(1))["params"]
  eqm_jax.save_pretrained(tmp_path / "timed", model, params)
  for mode in ("denoise", "inpaint", "compose", "ood", "readout"):
    with pytest.raises(ValueError, match="model.time_input = True"):
      modes.run(mode, config, str(tmp_path / "run"), str(tmp_path / "timed"))


@pytest.mark.slow
def test_tasks_on_points_of_the_plane(tmp_path):
  """Points lie beyond [−1, 1], and are drawn as points."""
  config = load_config("toy2d", "two_moons-smoke")
  config.evaluation.num_samples = None
  config.train.steps, config.optimizer.warmup_steps = 2, 1
  config.tasks.update(num_images=20, batch_size=20)
  modes.run("train", config, str(tmp_path))
  np.savez(tmp_path / "points.npz", x=builtin.plane("two_moons", 20, seed=3).images)
  config.tasks.images = str(tmp_path / "points.npz")
  for mode in ("denoise", "inpaint", "compose", "ood"):
    modes.run(mode, config, str(tmp_path))
    assert Image.open(tmp_path / mode / f"{mode}.png").size[0] > 600
  config.tasks.inpaint.mask = "left"
  with pytest.raises(ValueError, match="no pixel to paint on images of 1×1"):
    modes.run("inpaint", config, str(tmp_path))


MASK = np.arange(64).reshape(8, 8) % 2


@pytest.mark.parametrize("mask", [MASK, MASK > 0, MASK * 1.0, MASK[..., None], MASK[None]])
def test_masks_of_one_meaning_are_read(tmp_path, mask):
  np.save(tmp_path / "mask.npy", mask)
  np.savez(tmp_path / "mask.npz", mask)
  for name in ("mask.npy", "mask.npz"):
    read = inpaint.read_mask(str(tmp_path / name), (8, 8, 3))
    np.testing.assert_array_equal(read[..., 0], MASK)
    assert read.dtype == np.float32 and read.shape == (8, 8, 1)


@pytest.mark.parametrize(
  "mask, message",
  [
    (np.zeros((7, 8)), r"\(7, 8\), but the images are \(8, 8\)"),
    (np.stack([MASK, MASK]), r"\(2, 8, 8\), but .* one for all images"),
    (MASK * 255, "values such as 0, 255: give 1 .* mask > 127 of an image"),
    (MASK / 2, r"values such as 0\.0, 0\.5"),
    (np.where(MASK, np.nan, 0.0), "values such as 0.0, nan"),
    (MASK.astype(str), "values such as 0, 1: give"),
    (MASK * 0, "no pixel to paint"),
    (np.array([[None] * 8] * 8), "the array holds Python objects"),
  ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, mask, message):
  np.save(tmp_path / "mask.npy", mask)
  with pytest.raises(ValueError, match=f"tasks.inpaint.mask.*{message}"):
    inpaint.read_mask(str(tmp_path / "mask.npy"), (8, 8, 1))


def test_masks_in_files_that_hold_more_are_refused(tmp_path):
  np.savez(tmp_path / "mask.npz", a=MASK, b=MASK)
  with pytest.raises(ValueError, match="tasks.inpaint.mask: .*mask.npz holds several arrays, a, b: give a .npy of one"):
    inpaint.read_mask(str(tmp_path / "mask.npz"), (8, 8, 1))


@pytest.mark.parametrize("key", ["num_samples", "batch_size"])
def test_numbers_of_samples_are_refused_with_their_section(tmp_path, key):
  config = small_config()
  config.sample[key] = 0
  with pytest.raises(ValueError, match=f"sample.{key} = 0 must be at least 1"):
    modes.run("sample", config, str(tmp_path))


def test_images_that_are_all_the_same_have_no_mahalanobis_distance():
  for count in (1, 3):
    source = samples.Images(np.zeros((count, 8, 8, 1), np.float32), np.zeros(count, int), 1)
    with pytest.raises(ValueError, match=f"'mahalanobis' needs images that differ, but data.source has {count}"):
      outliers.make_score("mahalanobis", None, source)
  with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
    outliers.auroc(np.array([0.0, np.nan]), np.array([1.0]))


@pytest.mark.parametrize("run", ["none"], indirect=True)
def test_composition_is_refused_before_sampling_where_no_classifier_can_be_fitted(run, config, tmp_path, monkeypatch):
  np.savez(tmp_path / "one.npz", image=np.zeros((3, 8, 8, 1), np.uint8))
  config.data.source = "npz"
  config.data.options = ml_collections.ConfigDict({"path": str(tmp_path / "one.npz"), "num_classes": 10})
  monkeypatch.setattr(compose, "descend_sum", None)
  with pytest.raises(ValueError, match="evaluation.classifier_accuracy = True: a classifier needs two classes"):
    modes.run("compose", config, str(tmp_path / "run"), str(run[0]))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["none"], indirect=True)
@pytest.mark.parametrize("mode", ["denoise", "ood", "compose", "inpaint"])
def test_tasks_take_a_single_image(run, config, tmp_path, mode):
  np.save(tmp_path / "one.npy", spread_digits(1))
  config.tasks.update(images=str(tmp_path / "one.npy"), num_images=1, labels="none")
  config.tasks.denoise.gammas = (0.5,)
  config.tasks.ood.against = ("uniform", "gaussian")
  modes.run(mode, config, str(tmp_path), str(run[0]))
  assert Image.open(tmp_path / mode / f"{mode}.png") and (tmp_path / mode / f"{mode}.json").exists()


@pytest.mark.parametrize("name", outliers.MAKERS)
def test_outliers_differ_from_the_images_and_keep_their_range(name):
  images = builtin.digits().images[:50]
  made = outliers.make(name, images, seed=0)
  assert made.shape == images.shape and made.dtype == np.float32 and not np.array_equal(made, images)
  np.testing.assert_array_equal(made, outliers.make(name, images, seed=0))
  if name != "gaussian":
    assert made.min() >= -1 and made.max() <= 1
  if name in ("shuffled", "rotated"):
    np.testing.assert_array_equal(np.sort(made.reshape(50, -1)), np.sort(images.reshape(50, -1)))
