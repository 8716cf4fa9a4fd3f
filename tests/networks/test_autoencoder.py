import jax
import numpy as np
import pytest
from conftest import ROOT

from eqm_jax.checkpoints import sd_vae as convert
from eqm_jax.networks import autoencoder

DIRECTORY = ROOT / "tests" / "reference" / "vae_tiny"


def golden(name: str, dtype) -> np.ndarray:
  """An array of diffusers' AutoencoderKL, in NHWC."""
  return np.moveaxis(np.load(DIRECTORY / "golden.npz")[name], 1, -1).astype(dtype)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.1)])
def test_encoding_and_decoding_agree_with_diffusers(dtype, tolerance):
  with jax.enable_x64(dtype == "float64"):
    module, params = convert.load(str(DIRECTORY), dtype=dtype)
    wide = np.float64 if dtype == "float64" else np.float32
    encode, decode = (
      jax.jit(lambda x, method=method: module.apply({"params": params}, x, method=method))
      for method in ("encode", "decode")
    )
    mean, logvar = encode(golden("image", wide))
    for name, found in (("mean", mean), ("logvar", logvar), ("decoded", decode(golden("z", wide)))):
      assert found.dtype == wide  # whatever the convolutions compute in
      np.testing.assert_allclose(found, golden(name, wide), atol=tolerance, err_msg=name)


def test_the_posterior_has_its_mean_and_variance():
  mean, logvar = np.full((20_000, 1), 3.0, np.float32), np.full((20_000, 1), np.log(0.25), np.float32)
  sampled = autoencoder.posterior_sample(mean, logvar, jax.random.normal(jax.random.key(0), mean.shape))
  assert abs(sampled.mean() - 3) < 0.02 and abs(sampled.std() - 0.5) < 0.02


def test_shapes_that_do_not_fit_are_refused():
  module, params = convert.load(str(DIRECTORY))
  for method, shape, message in (
    ("encode", (1, 32, 36, 3), r"multiples of 8, but got \(1, 32, 36, 3\)"),
    ("encode", (1, 32, 32, 1), r"\[B, H, W, 3\]"),
    ("decode", (1, 4, 4, 3), "has 4 latent channels"),
  ):
    with pytest.raises(ValueError, match=message):
      module.apply({"params": params}, np.zeros(shape, np.float32), method=method)


def test_the_published_size_has_the_published_parameters():
  shapes = autoencoder.parameter_shapes(autoencoder.Autoencoder())
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863  # sd-vae-ft-ema
