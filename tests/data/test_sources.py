import numpy as np
import pytest
import sklearn.datasets

from eqm_jax.data import sources


def write_latents(directory, *, shape=(6, 2, 4, 4, 4), labels=None):
  rng = np.random.default_rng(0)
  np.save(directory / "mean.npy", rng.normal(size=shape).astype(np.float16))
  np.save(directory / "logvar.npy", rng.normal(size=shape).astype(np.float16))
  np.save(directory / "label.npy", np.arange(shape[0]) if labels is None else labels)
  return {"path": str(directory), "scale": 0.5, "num_classes": 10}


def test_digits_are_all_there_in_minus_one_to_one():
  source = sources.open_source("digits", {})
  assert len(source) == 1797 and source.shape == (8, 8, 1) and source.num_classes == 10
  images = np.stack([source[i]["image"] for i in range(len(source))])
  assert images.dtype == np.float32 and images.min() == -1 and images.max() == 1
  np.testing.assert_array_equal(source.labels, sklearn.datasets.load_digits().target)
  np.testing.assert_allclose((images[..., 0] + 1) * 8, sklearn.datasets.load_digits().images)


def test_latents_are_scaled_as_a_distribution(tmp_path):
  source = sources.open_source("latents", write_latents(tmp_path))
  sample = source[2]
  mean, logvar = (np.load(tmp_path / name).astype(np.float32)[2] for name in ("mean.npy", "logvar.npy"))
  np.testing.assert_allclose(sample["mean"], 0.5 * mean)
  np.testing.assert_allclose(np.exp(sample["logvar"] / 2), 0.5 * np.exp(logvar / 2), rtol=1e-5)
  assert source.shape == (4, 4, 4) and sample["label"] == 2 and sample["mean"].dtype == np.float32


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda d, o: (d / "logvar.npy").unlink(), "logvar.npy is missing"),
    (lambda d, o: (d / "mean.npy").write_bytes((d / "mean.npy").read_bytes()[:200]), "mean.npy: not a whole"),
    (lambda d, o: np.save(d / "label.npy", np.arange(3)), r"label \(3,\) do not fit"),
    (lambda d, o: np.save(d / "label.npy", np.arange(6) + 5), "labels 5..10, but num_classes = 10"),
    (lambda d, o: o.update(scale=0.0), "scale = 0.0"),
  ],
)
def test_bad_latents_are_refused(tmp_path, change, text):
  options = write_latents(tmp_path)
  change(tmp_path, options)
  with pytest.raises(ValueError, match=text):
    sources.open_source("latents", options)


def test_unknown_source_is_refused():
  with pytest.raises(ValueError, match="'imagenet' is not known: choose one of digits, latents"):
    sources.open_source("imagenet", {})
