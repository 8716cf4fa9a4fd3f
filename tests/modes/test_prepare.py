"""From photographs to decoded samples: the chain, and what is refused where its links do not fit."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from conftest import load_config
from PIL import Image

import eqm_jax
from eqm_jax import modes
from eqm_jax.checkpoints import pretrained
from eqm_jax.data import latents, sources
from eqm_jax.modes import prepare
from eqm_jax.training import fit_autoencoder


def small(directory: pathlib.Path, variant: str = "smoke"):
  """A few patches, the smallest networks, no evaluation."""
  config = load_config("photographs", variant)
  if "prepare" in config:
    config.prepare.options.stride = 60
    config.prepare.images_per_shard = 10
    config.data.options.path = str(directory / "latents")
  else:
    config.data.options.stride = 60
  config.autoencoder.update(path=str(directory / "autoencoder"), batch_size=6)
  config.model.update(width=16, depth=1, num_heads=2)
  config.train.update(steps=2, batch_size=4)
  config.optimizer.warmup_steps = 1
  config.evaluation.num_samples = None
  config.sample.update(num_samples=5, batch_size=5, sampler="adaptive", save_images=True)
  config.samplers.adaptive.max_nfe = 3
  return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
  """A directory with autoencoder, latents and run, all by one command."""
  directory = tmp_path_factory.mktemp("photographs")
  modes.run("train", small(directory), str(directory / "run"))
  return directory


@pytest.fixture
def directory(trained, tmp_path) -> pathlib.Path:
  """A copy to damage."""
  shutil.copytree(trained, tmp_path / "copy")
  return tmp_path / "copy"


@pytest.mark.slow
def test_the_chain_records_its_autoencoder_all_along(trained):
  module, params = pretrained.load_autoencoder(str(trained / "autoencoder"))
  manifest = latents.read_manifest(str(trained / "latents"))
  saved_id = manifest["autoencoder"]
  assert saved_id["name"] == "photographs" and saved_id["scaling_factor"] == module.scaling_factor
  assert manifest["records"] == manifest["images"] == len(latents.Latents(str(trained / "latents")))
  recorded = {name: saved_id[name] for name in ("name", "sha256")}
  assert eqm_jax.load(trained / "run").autoencoder == recorded
  with Image.open(trained / "latents" / "reconstructed.png") as picture:
    assert picture.width > 10 * 32 and picture.height > 2 * 32
  # What is cached is what this autoencoder makes of the images.
  source = sources.open_source("photographs", {"size": 32, "stride": 60, "shrink": 2})
  mean, _ = module.apply({"params": params}, source.images[:3], method="encode")
  cached = latents.Latents(str(trained / "latents"))
  np.testing.assert_allclose([cached.side(i, 0)["mean"] for i in range(3)], mean * module.scaling_factor, atol=2e-3)
  mirrored, _ = module.apply({"params": params}, source.images[:3, :, ::-1], method="encode")
  np.testing.assert_allclose([cached.side(i, 1)["mean"] for i in range(3)], mirrored * module.scaling_factor, atol=2e-3)


@pytest.mark.slow
def test_an_export_keeps_the_record(trained, tmp_path):
  loaded = eqm_jax.load(trained / "run")
  eqm_jax.save_pretrained(tmp_path / "export", loaded.model, loaded.params, autoencoder=loaded.autoencoder)
  assert eqm_jax.load(tmp_path / "export").autoencoder == loaded.autoencoder
  eqm_jax.save_pretrained(tmp_path / "pixels", loaded.model, loaded.params)
  assert eqm_jax.load(tmp_path / "pixels").autoencoder is None


@pytest.mark.slow
def test_samples_are_decoded(trained):
  config = small(trained)
  config.autoencoder.dtype = "bfloat16"  # of a decoder: free
  modes.run("sample", config, str(trained / "run"))
  config.autoencoder.dtype = "float32"
  modes.run("sample", config, str(trained / "run"))
  arrays = np.load(trained / "run" / "samples" / "samples.npz")
  assert arrays["x"].shape == (5, 8, 8, 4) and arrays["image"].shape == (5, 32, 32, 3)
  assert arrays["image"].dtype == np.uint8
  module, params = pretrained.load_autoencoder(str(trained / "autoencoder"))
  decoded = module.apply({"params": params}, arrays["x"] / module.scaling_factor, method="decode")
  expected = np.clip(np.rint(127.5 * decoded + 127.5), 0, 255)
  assert np.abs(arrays["image"] - expected).max() <= 1
  assert len(list((trained / "run" / "samples" / "images").iterdir())) == 5


@pytest.mark.slow
def test_prepared_again_it_only_verifies(trained, caplog):
  before = {file.name: file.stat().st_mtime_ns for file in (trained / "latents").iterdir()}
  with caplog.at_level("INFO"):
    modes.run("prepare", small(trained), str(trained / "run"))
  assert "all checksums are right" in caplog.text
  assert {file.name: file.stat().st_mtime_ns for file in (trained / "latents").iterdir()} == before


@pytest.mark.slow
def test_without_a_cache_images_are_encoded_in_each_step(trained, tmp_path):
  config = small(trained, "online")
  modes.run("train", config, str(tmp_path / "run"))
  losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert np.isfinite(losses).all()
  assert eqm_jax.load(tmp_path / "run").autoencoder == eqm_jax.load(trained / "run").autoencoder
  config.autoencoder.dtype, config.train.steps = "bfloat16", 3  # other latents
  with pytest.raises(ValueError, match="autoencoder.dtype: 'float32' in the workdir"):
    modes.run("train", config, str(tmp_path / "run"))


@pytest.mark.slow
def test_a_benchmark_trains_from_the_cache_and_from_images(trained, tmp_path):
  config = small(trained)
  config.benchmark.update(turns=1, batch_size=4, nfe=5, num_samples=4, steps=2)
  modes.run("benchmark", config, str(tmp_path))
  rows = json.loads((tmp_path / "benchmark" / "benchmark.json").read_text())["rows"]
  for name in ("training with data", "training, encoding online"):
    assert rows[name]["images_per_second"] > 0 and 0 <= rows[name]["details"]["data_wait"] <= 1
  assert "latents" in rows["training with data"]["about"] and str(trained) in rows["decoder"]["about"]


def replace_autoencoder(directory):
  """Other weights under the same path."""
  module, params = pretrained.load_autoencoder(str(directory / "autoencoder"))
  shutil.rmtree(directory / "autoencoder")
  pretrained.save_autoencoder(str(directory / "autoencoder"), module, jax.tree.map(lambda leaf: leaf * 1.01, params))


def other_latents(directory):
  """Makes a cache of other weights: only its records differ."""
  replace_autoencoder(directory)
  forget_latents(directory)
  prepare.prepare(small(directory))
  manifest = directory / "latents" / latents.MANIFEST
  assert "photographs" in manifest.read_text()


def forget_latents(directory):
  shutil.rmtree(directory / "latents")


def forget_autoencoder(directory):
  forget_latents(directory)
  shutil.rmtree(directory / "autoencoder")


def damage_shard(directory):
  shard = sorted((directory / "latents").glob("*.array_record"))[0]
  content = bytearray(shard.read_bytes())
  content[-1] ^= 1
  shard.write_bytes(content)


@pytest.mark.parametrize(
  "mode, harm, changes, message",
  [
    ("train", replace_autoencoder, {}, "'latents' is of latents of the autoencoder 'photographs' .* is given"),
    ("sample", replace_autoencoder, {}, "the model is of latents of the autoencoder 'photographs'"),
    ("evaluate", other_latents, {}, "the model is of latents of the autoencoder 'photographs'"),
    ("denoise", other_latents, {}, "the model is of latents of the autoencoder 'photographs'"),
    ("prepare", replace_autoencoder, {}, "latents is of latents of the autoencoder 'photographs'"),
    ("train", None, {"autoencoder.path": None, "autoencoder.sha256": "00"}, "autoencoder.sha256 = '00', but 'latents'"),
    ("train", None, {"autoencoder.dtype": "bf16"}, "autoencoder.dtype = 'bf16' must be one of"),
    ("train", forget_latents, {"prepare.fit.model.layers_per_block": 2}, "is not that of prepare.fit.model"),
    ("train", forget_latents, {"prepare.images_per_shard": 0}, "prepare.images_per_shard = 0"),
    ("train", forget_autoencoder, {"prepare.fit.steps": 1}, "prepare.fit.steps = 1 must be at least 2"),
    ("train", forget_autoencoder, {"autoencoder.path": None}, "autoencoder.path = None must be a directory"),
    ("train", None, {"data.options.path": "gs://bucket/latents"}, "mount the bucket"),
    ("train", None, {"autoencoder.name": "mse"}, "'photographs'.* saved, .*'mse'.* requested"),
    ("train", None, {"autoencoder.sha256": "00"}, "autoencoder.sha256 = '00'"),
    ("train", None, {"autoencoder.batch_size": 0}, "autoencoder.batch_size = 0"),
    ("train", None, {"autoencoder.path": "nowhere"}, "nowhere: no such autoencoder"),
    (
      "train",
      None,
      {"prepare.options.size": 16},
      "manifest.json is of other latents: options: .*'size': 32.*'size': 16",
    ),
    ("train", None, {"prepare.dtype": "bfloat16"}, "dtype: 'float16' saved"),
    ("train", None, {"model.input_size": 4}, "model.input_size: 8 in the workdir, 4 in this config"),
    ("train", damage_shard, {}, "its SHA-256 is not that of manifest.json"),
    ("prepare", damage_shard, {}, "its SHA-256 is not that of manifest.json"),
  ],
)
@pytest.mark.slow
def test_links_that_do_not_fit_are_refused(directory, mode, harm, changes, message):
  if harm:
    harm(directory)
  config = small(directory)
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    modes.run(mode, config, str(directory / "run"))


@pytest.mark.slow
def test_latents_of_another_shape_than_the_models_are_refused(directory):
  config = small(directory)
  config.model.input_size = 4
  with pytest.raises(ValueError, match=r"samples of shape \(8, 8, 4\), but the model takes \(4, 4, 4\)"):
    modes.run("train", config, str(directory / "another_run"))


@pytest.mark.slow
def test_a_run_does_not_go_on_with_latents_of_another_autoencoder(directory):
  replace_autoencoder(directory)
  forget_latents(directory)
  config = small(directory)
  with pytest.raises(ValueError, match="run is of latents of the autoencoder 'photographs'"):
    modes.run("train", config, str(directory / "run"))


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_number_of_samples(directory):
  forget_latents(directory)
  config = small(directory)
  config.prepare.options.stride = 70
  with pytest.raises(ValueError, match=r"run was trained on \d+ samples, but the data set has \d+"):
    modes.run("train", config, str(directory / "run"))


@pytest.mark.slow
def test_an_interrupted_start_is_begun_again(directory):
  """Killed while the autoencoder was saved, and before: what is left has other names."""
  forget_autoencoder(directory)
  (directory / "autoencoder.partial" / "params").mkdir(parents=True)
  prepare.prepare(small(directory))
  assert latents.is_finished(str(directory / "latents")) and not (directory / "autoencoder.partial").exists()


def test_what_needs_no_preparing_says_so(tiny_config, tmp_path):
  with pytest.raises(ValueError, match="has no section `prepare`"):
    modes.run("prepare", tiny_config, str(tmp_path))


@pytest.mark.slow
def test_an_autoencoder_learns_to_bring_images_back():
  config = load_config("photographs", "smoke")
  source = sources.open_source("photographs", {"size": 16, "stride": 30, "shrink": 2})
  errors = {}
  for steps in (2, 60):
    config.prepare.fit.update(steps=steps, batch_size=8, learning_rate=5e-3)
    module, params = fit_autoencoder.fit(config.prepare.fit, source, seed=0)
    back = module.apply({"params": params}, source.images)
    errors[steps] = float(np.mean(np.abs(back - source.images)))
  assert errors[60] < 0.6 * errors[2]
  mean, logvar = module.apply({"params": params}, source.images, method="encode")
  assert abs(module.scaling_factor * np.sqrt(np.var(mean) + np.mean(np.exp(logvar))) - 1) < 0.02
