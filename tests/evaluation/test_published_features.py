"""Features of a published network from the config to the report, on a small DINOv2: what is special to no network."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from conftest import load_config
from dinov2_weights import small_weights, write

from eqm_jax import modes
from eqm_jax.checkpoints import dinov2 as convert
from eqm_jax.data import builtin
from eqm_jax.data.samples import Images
from eqm_jax.evaluation import evaluator, features, metrics, reference_data, validation
from eqm_jax.evaluation.reference_data import ReferenceData
from eqm_jax.networks import dinov2
from eqm_jax.networks.dit import DiT
from eqm_jax.plotting import to_uint8
from eqm_jax.sampling.generator import Generator


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  return str(write(tmp_path_factory.mktemp("weights") / "dinov2.safetensors", small_weights(depth=1)))


@pytest.fixture(scope="module")
def photographs() -> Images:
  return builtin.photographs(size=16, stride=40, shrink=2)


@pytest.fixture
def config(tiny_config, weights):
  tiny_config.model.update(input_size=16, channels=3, patch_size=8, num_classes=2)
  tiny_config.samplers.gd.max_nfe = 1
  tiny_config.evaluation.update(
    num_samples=12, chunk_size=12, samplers=("gd",), plot_sampler=None, features=("dinov2",), classifier_accuracy=False
  )
  tiny_config.evaluation.dinov2.update(path=weights, batch_size=8)
  return tiny_config


@pytest.fixture
def generator(config):
  return Generator(DiT(**config.model), None, jax.random.key(0), batch_size=12, multiplier=4.0)


def test_samples_are_compared_in_its_features(config, generator, photographs, weights, tmp_path):
  validation.check_options(config, generator)
  validation.check_data(config, generator, None, photographs)
  x, label = np.zeros((1, *generator.model.input_shape), np.float32), np.zeros(1, np.int32)
  params = jax.jit(generator.model.init)(jax.random.key(0), x, label)["params"]
  generator = dataclasses.replace(generator, params=params)
  reference = ReferenceData(config.evaluation, None, photographs, 1)
  config.evaluation.save_npz = True
  report = evaluator.evaluate(config, generator, reference, str(tmp_path), {})
  described = report["features"]["dinov2"]
  assert described["resize"] == "bicubic" and described["network"] == "ViT of width 64 and depth 1/14"
  assert len(described["sha256"]) == 64 and described["real"]["samples"] == len(photographs)
  found = report["rows"]["gd"]["metrics"]["dinov2"]
  with np.load(tmp_path / "gd.npz") as arrays:
    pool, real = (
      np.asarray(dinov2.features(*convert.load(weights), images))
      for images in (arrays["arr_0"], to_uint8(photographs.images))
    )
  np.testing.assert_allclose(found["frechet"], metrics.frechet_distance(pool, real), rtol=1e-3)
  np.testing.assert_allclose(found["mind"], metrics.mind(pool, real), rtol=1e-3)
  assert found["mind_samples"] == 12 and found["mind_error"] > 0
  assert {"kernel_distance", "precision", "recall"} <= set(found) and "spatial_frechet" not in found
  table = re.sub(" +", " ", (tmp_path / "evaluation.md").read_text())
  assert "Features: dinov2 (resize bicubic, network ViT of width" in table
  assert "; MIND of 12 samples and as many real ones\n" in table
  assert "| sampler | Fréchet | kernel distance | MIND | precision | recall |" in table


def test_statistics_are_computed_with_one_command(weights, tmp_path):
  config = load_config("photographs", "smoke")
  config.prepare.options.update(size=16, stride=40)
  config.evaluation.update(features=("raw", "dinov2"))
  path = tmp_path / "statistics.npz"
  config.evaluation.dinov2.update(path=weights, reference=str(path), batch_size=8)
  modes.run("statistics", config, str(tmp_path / "run"))
  space = features.open_features("dinov2", config.evaluation, None, False)
  known = reference_data.load(str(path), space)
  images = to_uint8(builtin.photographs(size=16, stride=40, shrink=2).images)
  pool = space.extract(images)["pool"]
  assert set(known.gaussians) == {"pool"} and space.sizes == {"pool": 64}
  np.testing.assert_array_equal(known.features, pool)
  np.testing.assert_allclose(known.gaussians["pool"].mean, pool.mean(axis=0), rtol=1e-6)
  assert metrics.compute({"pool": pool}, known)["mind"] < 1e-9
  with pytest.raises(
    ValueError, match=r"NAME.reference \(here {'dinov2': .*statistics.npz'}\) a file that does not ex"
  ):
    modes.run("statistics", config, str(tmp_path / "run"))
  config.evaluation.features = ("inception", "dinov2")  # Inception's weights are missing, and not needed here
  config.evaluation.inception.reference = str(path)
  again = str(tmp_path / "again.npz")
  config.evaluation.dinov2.reference = again
  modes.run("statistics", config, str(tmp_path / "run"))
  np.testing.assert_array_equal(reference_data.load(again, space).features, pool)
  config.evaluation.inception.reference = config.evaluation.dinov2.reference = str(tmp_path / "both.npz")
  with pytest.raises(ValueError, match="inception.reference and evaluation.dinov2.reference are one file, .*their own"):
    modes.run("statistics", config, str(tmp_path / "run"))
  config.evaluation.dinov2.reference = str(path)
  config.evaluation.dinov2.resize = "tf1"
  other = features.open_features("dinov2", config.evaluation, None, False)
  with pytest.raises(ValueError, match="evaluation.dinov2.reference: .*statistics of .*bicubic.*features are .*tf1"):
    reference_data.load(str(path), other)


def test_the_images_in_adms_file_give_statistics(config, photographs, tmp_path):
  """Its mu and sigma are those of Inception."""
  images = to_uint8(photographs.images)[:20]
  path = tmp_path / "VIRTUAL.npz"
  np.savez(path, arr_0=images, mu=np.ones(2048), sigma=np.eye(3))
  config.evaluation.dinov2.reference = str(path)
  assert validation.needs(config) == (False, False)
  reference = ReferenceData(config.evaluation, None, None, 1)
  ((space, known, _),) = reference._spaces
  np.testing.assert_array_equal(known.features, space.extract(images)["pool"])
  assert known.origin == {"from": "VIRTUAL.npz", "samples": 20, "features": space.settings}
  assert reference.describe()["dinov2"]["real"]["frechet_between_halves"] > 0


@pytest.mark.parametrize(
  "arrays, text",
  [
    (dict(mu=np.ones(64), sigma=np.eye(64)), "statistics of another program, which are of Inception, but .* dinov2"),
    (dict(arr_0=np.zeros((9, 20, 20, 1), np.uint8)), r"arr_0 is uint8\[9, 20, 20, 1\], but images"),
    (dict(arr_0=np.zeros((1, 20, 20, 3), np.uint8)), "arr_0 holds 1 image, but statistics need 2"),
    (dict(arr_0=np.zeros((9, 20, 20, 3), np.uint8)), "dinov2 features of arr_0: all rows are the same"),
  ],
)
def test_other_programs_statistics_are_refused(config, tmp_path, arrays, text):
  np.savez(tmp_path / "other.npz", **arrays)
  space = features.open_features("dinov2", config.evaluation, None, False)
  with pytest.raises(ValueError, match=f"evaluation.dinov2.reference: .*{text}"):
    reference_data.load(str(tmp_path / "other.npz"), space)


@pytest.mark.parametrize(
  "change, text",
  [
    (dict(path="nowhere.pth"), "dinov2.path = 'nowhere.pth': no such file. Fetch dinov2_vitl14_pretrain.pth"),
    (dict(resize="half_pixel"), "dinov2.resize = 'half_pixel' must be one of bicubic, tf1"),
    (dict(dtype="bfloat16"), "dinov2.dtype = 'bfloat16' must be 'float32'"),
    (dict(batch_size=0), "dinov2.batch_size = 0"),
    (dict(reference="nowhere.npz"), "dinov2.reference: nowhere.npz: no such statistics"),
  ],
)
def test_bad_options_are_refused(config, generator, change, text):
  config.evaluation.dinov2.update(change)
  with pytest.raises(ValueError, match=f"evaluation.{text}"):
    validation.check_options(config, generator)


@pytest.mark.parametrize("shape", [dict(channels=1), dict(input_size=8)], ids=["grey", "small"])
def test_grey_and_tiny_samples_are_refused_before_anything_runs(config, generator, shape):

  other = dataclasses.replace(generator, model=generator.model.clone(**shape))
  with pytest.raises(ValueError, match=r"'dinov2' takes RGB images of at least 14 × 14 pixels, but the samples are \("):
    validation.check_data(config, other, None, None)


@pytest.mark.slow  # compiles a training
def test_a_training_is_evaluated_in_its_features(config, weights, tmp_path):
  config.data.source = "photographs"
  config.data.options = dict(size=16, stride=40, shrink=2)
  config.train.steps = 4
  config.evaluation.during_training.update(every=2, num_samples=12, sampler="gd")
  modes.run("train", config, str(tmp_path))
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  evaluated = {line["step"]: line for line in lines if "dinov2/mind" in line}
  assert set(evaluated) == {2, 4} and all(line["dinov2/frechet"] > 0 for line in evaluated.values())
  assert json.loads((tmp_path / "best.json").read_text())["best"]["step"] in (2, 4)
  assert "dinov2/mind: " in (tmp_path / "report.html").read_text()
