import numpy as np
import pytest
import sklearn.datasets

from eqm_jax.data import sources


def test_digits_are_all_there_in_minus_one_to_one():
  source = sources.open_source("digits", {})
  assert len(source) == 1797 and source.shape == (8, 8, 1) and source.num_classes == 10
  images = np.stack([source[i]["image"] for i in range(len(source))])
  assert images.dtype == np.float32 and images.min() == -1 and images.max() == 1
  np.testing.assert_array_equal(source.labels, sklearn.datasets.load_digits().target)
  np.testing.assert_allclose((images[..., 0] + 1) * 8, sklearn.datasets.load_digits().images)


@pytest.mark.slow
def test_classes_have_names():
  assert sources.open_source("digits", {}).class_names == tuple("0123456789")
  assert sources.open_source("photographs", {"stride": 60}).class_names == ("temple", "flower")
  assert sources.open_source("plane", {"kind": "two_moons", "count": 9}).class_names is None


def test_mnist_is_averaged_and_mixed():
  small, full = (sources.open_source("mnist", {"size": size}) for size in (14, 28))
  assert small.images.shape == (5000, 14, 14, 1) and full.images.shape == (5000, 28, 28, 1)
  assert full.images.min() == -1 and full.images.max() == 1
  np.testing.assert_allclose(small.images[7, 3, 5], full.images[7, 6:8, 10:12].mean(), atol=1e-6)
  np.testing.assert_array_equal(small.labels, full.labels)
  assert (np.bincount(small.labels) == 500).all() and len(set(small.labels[:50])) == 10
  train, test = (sources.open_source("mnist", {"part": part}) for part in ("train", "test"))
  assert len(train) + len(test) == 5000 and len(set(test.labels)) == 10


def test_photographs_are_cut_into_patches():
  source = sources.open_source("photographs", {"size": 32, "stride": 50, "shrink": 1})
  temple, flower = sklearn.datasets.load_sample_images().images
  across, down = (640 - 32) // 50 + 1, (427 - 32) // 50 + 1
  assert source.images.shape == (2 * across * down, 32, 32, 3) and source.num_classes == 2
  for label, photograph in enumerate((temple, flower)):
    patch = source.images[source.labels == label][across + 2]
    np.testing.assert_allclose((patch + 1) * 127.5, photograph[50:82, 100:132], atol=1e-3)


@pytest.mark.parametrize(
  "name, options, message",
  [
    (
      "imagenet",
      {},
      "'imagenet' must be one of digits, mnist, photographs, openmoji, plane, folder, tfds, npz, latents",
    ),
    ("digits", {"part": "half"}, "data.options.part = 'half' must be one of all, train, test"),
    ("mnist", {"size": 7}, "data.options.size = 7 must be one of 14, 28"),
    ("photographs", {"size": 300, "shrink": 2}, r"data.options.size = 300 must be in \[1, 213\]: photographs are"),
    ("photographs", {"stride": 0}, "data.options.stride = 0 must be at least 1"),
    ("plane", {"kind": "three_moons"}, "'three_moons' must be one of two_moons, eight_gaussians, checkerboard"),
    ("plane", {"kind": "two_moons", "count": 0}, "data.options.count = 0 must be at least 1"),
    ("folder", {"file": "a"}, "it takes path, size, channels"),
  ],
)
def test_unknown_names_and_options_are_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    sources.open_source(name, options)
