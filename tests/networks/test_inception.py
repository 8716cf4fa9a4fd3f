"""Agreement with the FID's Inception in PyTorch. `pytest tests/networks/test_inception.py -n 0 -s` prints the table."""

import json
import runpy

import jax
import numpy as np
import pytest
from conftest import ROOT, run_python
from jax.extend.core import jaxprs_in_params

from eqm_jax.checkpoints import inception as convert
from eqm_jax.networks import inception

DIRECTORY = ROOT / "tests" / "reference" / "inception"
GOLDEN = np.load(DIRECTORY / "golden.npz")
NAMES = ("pool", "spatial", "logits_unbiased")
SIZES = (64, 256)


@pytest.fixture(scope="module")
def params():
  return convert.load(runpy.run_path(str(DIRECTORY / "seeded_weights.py"))["seeded_weights"]())


def test_every_array_agrees(params):
  rows, traced, network = [], [], inception._network.__wrapped__
  compiled = jax.jit(lambda *arguments: traced.append(1) or network(*arguments))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inception, "_network", compiled)
    for size in SIZES:
      for resize in inception.RESIZES:
        found = inception.features(params, GOLDEN[f"images_{size}"], resize)
        assert set(found) == set(NAMES) and all(array.dtype == np.float32 for array in found.values())
        rows += [(f"{name}_{size}_{resize}", np.asarray(found[name], np.float64)) for name in NAMES]
  assert len(traced) == 1  # one compilation, whatever the size of the images
  print("\narray, error relative to the norm, largest error relative to the largest value")
  wrong = []
  for name, ours in rows:
    theirs = GOLDEN[name]
    assert ours.shape == theirs.shape, name
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    largest = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"  {name:32s} {error:8.1e} {largest:8.1e}")
    if not (error <= 1e-5 and np.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())):
      wrong.append((name, error, largest))
  assert not wrong
  assert {name for name, _ in rows} | {f"images_{size}" for size in SIZES} == set(GOLDEN)


@pytest.mark.parametrize("resize, low, high", [("tf1", -1, 127 / 128), ("half_pixel", -1, 1)])
def test_height_and_width_are_resized_each_along_its_own_axis(resize, low, high):
  images = np.zeros((1, 3, 40, 3), np.uint8)
  images[:, :, 20:, 1] = 255  # the right half is green
  x = np.asarray(inception._prepare(images, resize))
  assert x.shape == (1, 299, 299, 3)
  np.testing.assert_allclose(x[..., [0, 2]], low, atol=1e-6)
  np.testing.assert_allclose(x[:, :, :140, 1], low, atol=1e-6)
  np.testing.assert_allclose(x[:, :, 160:, 1], high, atol=1e-6)


def test_every_product_is_in_full_precision(params):
  """A TPU would otherwise multiply in bfloat16, which no test on a CPU shows."""
  jaxpr = jax.make_jaxpr(inception.features)(params, GOLDEN["images_64"])
  precisions: dict[str, list] = {"conv_general_dilated": [], "dot_general": []}

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name in precisions:
        precisions[equation.primitive.name].append(equation.params["precision"])
      for inner in jaxprs_in_params(equation.params):
        walk(inner)

  walk(jaxpr.jaxpr)
  assert {name: len(found) for name, found in precisions.items()} == {"conv_general_dilated": 94, "dot_general": 3}
  highest = (jax.lax.Precision.HIGHEST,) * 2
  assert all(precision == highest for found in precisions.values() for precision in found)


def test_features_are_float32_where_jax_computes_in_float64(params):
  with jax.enable_x64(True):
    shapes = jax.eval_shape(inception.features, params, GOLDEN["images_64"])
  assert {name: leaf.dtype for name, leaf in shapes.items()} == dict.fromkeys(NAMES, np.float32)


# The features of two images, one on each of two simulated devices, inside an outer jit.
PROGRAM = """
import json, runpy, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from eqm_jax.checkpoints import inception as convert
from eqm_jax.networks import inception

directory = sys.argv[1]
params = convert.load(runpy.run_path(directory + "/seeded_weights.py")["seeded_weights"]())
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
batch = NamedSharding(mesh, PartitionSpec("data"))
params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
images = jax.device_put(np.load(directory + "/golden.npz")["images_64"], batch)
found = jax.jit(lambda images: inception.features(params, images, "half_pixel"))(images)
places = {name: [len(shard.data) for shard in array.addressable_shards] for name, array in found.items()}
json.dump({"places": places, "found": {name: array.tolist() for name, array in found.items()}}, sys.stdout)
"""


@pytest.mark.slow  # compiles the network for two devices
def test_images_may_lie_on_several_devices():
  output = json.loads(run_python("-c", PROGRAM, DIRECTORY, devices=2).stdout)
  assert output["places"] == {name: [1, 1] for name in NAMES}
  for name in NAMES:
    expected = GOLDEN[f"{name}_64_half_pixel"]
    np.testing.assert_allclose(output["found"][name], expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)


@pytest.mark.parametrize(
  "images, seen",
  [
    (np.zeros((2, 8, 8, 1), np.uint8), r"uint8 \(2, 8, 8, 1\)"),
    (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 \(2, 3, 8, 8\)"),
    (np.zeros((2, 8, 8, 4), np.uint8), r"uint8 \(2, 8, 8, 4\)"),
    (np.zeros((8, 8, 3), np.uint8), r"uint8 \(8, 8, 3\)"),
    (np.zeros((0, 8, 8, 3), np.uint8), r"uint8 \(0, 8, 8, 3\)"),
    (np.zeros((2, 8, 8, 3), np.float32), r"float32 \(2, 8, 8, 3\): convert floats in \[−1, 1\]"),
    (np.zeros((2, 8, 8, 3), np.int64), r"int64 \(2, 8, 8, 3\)"),
    ([[[[0, 0, 0]]]], "a list"),
  ],
)
def test_other_arrays_than_batches_of_images_are_refused(images, seen):
  with pytest.raises(ValueError, match=rf"takes images uint8 \[B, H, W, 3\], B ≥ 1, in 0..255, but got {seen}"):
    inception.features({}, images)


def test_an_unknown_resize_is_refused():
  with pytest.raises(ValueError, match="resize = 'bicubic' must be one of tf1, half_pixel"):
    inception.features({}, GOLDEN["images_64"], "bicubic")
