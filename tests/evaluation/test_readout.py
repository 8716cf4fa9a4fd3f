import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqm_jax.equilibrium import noise_level
from eqm_jax.evaluation import readout
from eqm_jax.networks.dit import DiT
from eqm_jax.sampling.generator import Generator

RNG = np.random.default_rng(0)
MODEL = DiT(input_size=4, channels=2, patch_size=2, width=8, depth=1, num_heads=2, num_classes=3)
IMAGES, LABELS = RNG.choice([-0.2, 0.2], (40, 4, 4, 2)).astype(np.float32), np.arange(40, dtype=np.int32) % 3


@pytest.fixture(scope="module")
def generator() -> Generator:
  x, label = jnp.zeros((1, *MODEL.input_shape)), jnp.zeros(1, jnp.int32)
  params = jax.jit(MODEL.init)(jax.random.key(1), x, label)["params"]
  params = jax.tree.map(lambda leaf: leaf + 0.1 * RNG.normal(size=leaf.shape).astype(np.float32), params)
  return Generator(MODEL, params, jax.random.key(0), batch_size=32, multiplier=4.0)


@pytest.fixture(scope="module")
def study(generator) -> readout.Study:
  return readout.study(generator, (IMAGES[:30], LABELS[:30]), (IMAGES[30:], LABELS[30:]), 600, 1e-3)


def test_predictions_are_those_of_the_readout_on_noised_images(generator, study):
  """γ̂ is that of the right image at the right γ, and of its class or, half of the time, of none."""
  assert len(study.gamma) == len(study.predicted["network"]) == 100 and 0.3 < study.has_class.mean() < 0.7
  assert study.gamma.min() < 0.05 and study.gamma.max() > 0.95
  near = int(np.argmax(study.gamma))  # nearly the image itself
  image, label = IMAGES[30:][near % 10], LABELS[30:][near % 10] if study.has_class[near] else 3
  features = noise_level.features(MODEL, generator.params, study.gamma[near] * image[None], jnp.asarray([label]))
  assert abs(study.readout.of_features(features)[0] - study.predicted["network"][near]) < 0.1


def test_the_report_has_the_errors_of_all_samples_of_bins_and_of_classes(study):
  report = study.report()
  assert list(report) == ["network", "untrained network", "pixel statistics"]
  assert report["network"]["rmse"] < 0.2 < 0.289  # of the answer γ = .5
  error = study.predicted["network"] - study.gamma
  found = report["network"]
  np.testing.assert_allclose([found["rmse"], found["bias"]], [np.sqrt(np.mean(error**2)), error.mean()], rtol=1e-5)
  assert sum(part["samples"] for part in found["bins"]) == 100
  high = (study.gamma >= 0.9) & (study.gamma < 1)
  np.testing.assert_allclose(found["bins"][-1]["bias"], error[high].mean(), rtol=1e-5)
  share = study.has_class.mean()
  both = share * found["rmse_with_class"] ** 2 + (1 - share) * found["rmse_without_class"] ** 2
  np.testing.assert_allclose(both, found["rmse"] ** 2, rtol=1e-5)


def test_the_study_does_not_depend_on_the_batch_size(generator, study):
  data = (IMAGES[:30], LABELS[:30]), (IMAGES[30:], LABELS[30:])
  again = readout.study(dataclasses.replace(generator, batch_size=50), *data, 600, 1e-3)
  np.testing.assert_array_equal(again.gamma, study.gamma)
  np.testing.assert_allclose(again.predicted["network"], study.predicted["network"], atol=1e-3)


@pytest.mark.parametrize(
  "change, text", [({"energy": "dot"}, "gradient of an energy"), ({"time_input": True}, "takes γ")]
)
def test_models_that_have_no_readout_are_refused(generator, change, text):
  other = dataclasses.replace(generator, model=MODEL.clone(**change))
  with pytest.raises(ValueError, match=text):
    readout.study(other, (IMAGES, LABELS), (IMAGES, LABELS), 600, 1e-3)
