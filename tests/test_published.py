"""The paper's figures with the authors' checkpoints: what a user runs who has the files, on stand-ins for them."""

import json
import runpy

import jax
import numpy as np
import pytest
from conftest import ROOT, legacy_file, legacy_state_dict, legacy_tensor, load_config

from eqm_jax import modes
from eqm_jax.checkpoints import eqm_torch
from eqm_jax.checkpoints import inception as convert
from eqm_jax.data import builtin
from eqm_jax.evaluation.metrics import GaussianStatistics, inception_score
from eqm_jax.networks import dit, inception


@pytest.mark.parametrize(
  "variant, settings",
  [
    ("B/2", dict(rule="gd", step_size=0.003, momentum=0.0, guidance=1.0)),
    ("XL/2", dict(rule="nag", step_size=0.0017, momentum=0.3, guidance=1.5, guidance_channels=3)),
  ],
)
def test_the_published_settings_are_what_is_evaluated(variant, settings):
  config = load_config("imagenet256", variant)
  (name,) = config.evaluation.samplers
  assert {key: config.samplers[name][key] for key in settings} == settings
  assert config.samplers[name].max_nfe == 249 and config.samplers[name].threshold is None
  options = config.evaluation
  assert options.num_samples == 50_000 and options.labels == "random" and options.weights == "ema"
  assert tuple(options.features) == ("inception",) and options.inception.resize == "tf1"
  assert options.inception.reference.endswith("VIRTUAL_imagenet256_labeled.npz")
  assert config.autoencoder.dtype == "float32"


def write_checkpoint(path):
  """A small network of five classes, as the authors save theirs."""
  model = dit.DiT(input_size=8, channels=4, patch_size=2, width=16, depth=2, num_heads=2, num_classes=5)
  x, label = np.zeros((1, 8, 8, 4)), np.zeros(1, np.int32)
  params = jax.device_get(jax.jit(model.init)(jax.random.key(0), x, label)["params"])
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)
  eqm_torch.export_reference(str(path), model, params)


def write_weights(path):
  weights = runpy.run_path(str(ROOT / "tests" / "reference" / "inception" / "seeded_weights.py"))["seeded_weights"]()
  strides = {name: tuple(step // 4 for step in array.strides) for name, array in weights.items()}
  entries = {name: legacy_tensor(weights, name, 0, array.shape, strides[name]) for name, array in weights.items()}
  path.write_bytes(legacy_file(legacy_state_dict(entries), weights))
  return weights


def write_reference(path, weights):
  """Twenty patches of photographs in the form of ADM's file."""
  images = np.rint(127.5 * builtin.photographs(size=64, stride=30).images[:20] + 127.5).astype(np.uint8)
  found = inception.features(convert.load(weights), images)
  pool, spatial = (
    GaussianStatistics.of(np.asarray(found["pool"])),
    GaussianStatistics.of(np.asarray(found["spatial"]).reshape(20, -1)),
  )
  (mean, covariance), (mean_s, covariance_s) = ((m.gaussian.mean, m.gaussian.covariance) for m in (pool, spatial))
  np.savez(path, arr_0=images, mu=mean, sigma=covariance, mu_s=mean_s, sigma_s=covariance_s)


@pytest.mark.slow  # eigenvalues of 2,048 × 2,048: about two minutes
def test_a_checkpoint_of_the_authors_is_evaluated_with_one_command(tmp_path):
  write_checkpoint(tmp_path / "EqM.pt")
  weights = write_weights(tmp_path / "inception.pth")
  write_reference(tmp_path / "VIRTUAL.npz", weights)

  config = load_config("imagenet256", "XL/2")
  config.autoencoder.path = str(ROOT / "tests" / "reference" / "vae_tiny")
  config.evaluation.update(num_samples=12, batch_size=4, chunk_size=6, save_npz=True)
  config.evaluation.inception.update(
    path=str(tmp_path / "inception.pth"), reference=str(tmp_path / "VIRTUAL.npz"), batch_size=6
  )
  config.samplers.published_xl2.max_nfe = 5
  modes.run("evaluate", config, str(tmp_path / "run"), str(tmp_path / "EqM.pt"))

  report = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
  assert report["weights"]["checkpoint"].endswith("EqM.pt") and report["labels"] == "random"
  assert report["features"]["inception"]["resize"] == "tf1"
  assert report["features"]["inception"]["real"]["program"] == "ADM"
  assert report["autoencoder"].startswith("ema ")
  row = report["rows"]["published_xl2"]
  assert (row["rule"], row["eta"], row["momentum"], row["guidance"]) == ("nag", 0.0017, 0.3, 1.5)
  metrics = row["metrics"]["inception"]
  assert metrics["frechet"] > 0 and metrics["spatial_frechet"] > 0 and metrics["inception_score"] >= 1
  assert {"frechet_error", "kernel_distance", "precision", "recall"} <= set(metrics)
  # The images that were judged are those in the file: ADM's evaluator would see the same.
  with np.load(tmp_path / "run" / "evaluation" / "published_xl2.npz") as arrays:
    images = arrays["arr_0"]
  assert images.shape == (12, 64, 64, 3) and images.dtype == np.uint8
  logits = np.asarray(inception.features(convert.load(weights), images)["logits_unbiased"])
  np.testing.assert_allclose(metrics["inception_score"], inception_score(logits)[0], rtol=1e-5)


@pytest.mark.slow
def test_statistics_of_a_data_set_are_computed_with_one_command(tmp_path):
  weights = write_weights(tmp_path / "inception.pth")
  config = load_config("photographs", "smoke")
  config.prepare.options.update(size=64, stride=60)
  config.evaluation.update(features=("inception",))
  config.evaluation.inception.update(
    path=str(tmp_path / "inception.pth"), reference=str(tmp_path / "s.npz"), batch_size=8
  )
  modes.run("statistics", config, str(tmp_path / "run"))
  source = builtin.photographs(size=64, stride=60, shrink=2)
  images = np.rint(127.5 * source.images + 127.5).astype(np.uint8)
  pool = np.asarray(inception.features(convert.load(weights), images)["pool"])
  with np.load(tmp_path / "s.npz") as file:
    np.testing.assert_allclose(file["mu"], pool.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert file["sigma_s"].shape == (2023, 2023) and len(file["features"]) == len(source)
  with pytest.raises(ValueError, match="a file that does not exist yet"):
    modes.run("statistics", config, str(tmp_path / "run"))
