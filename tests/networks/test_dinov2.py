"""Agreement with DINOv2 in PyTorch. `pytest tests/networks/test_dinov2.py -n 0 -s` prints the table."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import ROOT, run_python
from jax.extend.core import jaxprs_in_params
from PIL import Image

from eqm_jax.checkpoints import dinov2 as convert
from eqm_jax.networks import dinov2
from eqm_jax.networks.dinov2 import DINOv2

DIRECTORY = ROOT / "tests" / "reference" / "dinov2_tiny"
GOLDEN = np.load(DIRECTORY / "golden.npz")
SHAPES = ("32x32", "64x64", "256x200")
SMALL = dict(width=8, depth=2, num_heads=2, patch_size=56, grid=6, mlp_width=12)  # 16 patches


@pytest.fixture(scope="module")
def loaded():
  return convert.load(DIRECTORY / "weights.pth", num_heads=3)


def test_every_array_agrees(loaded):
  rows, traced, network = [], [], dinov2._network.__wrapped__
  compiled = jax.jit(lambda *arguments: traced.append(1) or network(*arguments), static_argnums=0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dinov2, "_network", compiled)
    for shape in SHAPES:
      for resize in dinov2.RESIZES:
        found = dinov2.features(*loaded, GOLDEN[f"images_{shape}"], resize)
        assert found.dtype == np.float32
        rows.append((f"features_{shape}_{resize}", np.asarray(found, np.float64)))
  assert len(traced) == 1  # one compilation, whatever the size of the images
  print("\narray, error relative to the norm, largest error")
  for name, ours in rows:
    theirs = GOLDEN[name]
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    print(f"  {name:26s} {error:8.1e} {np.abs(ours - theirs).max():8.1e}")
    np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=0, err_msg=name)
  assert {name for name, _ in rows} | {f"images_{s}" for s in SHAPES} | {"num_heads"} == set(GOLDEN)


def random_params(module: DINOv2):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), dinov2.parameter_shapes(module))


def normalised(x, p):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def expected_class_tokens(module: DINOv2, p, x):
  """The network in float64 numpy, image by image and head by head."""

  def dense(x, p):
    return x @ p["kernel"] + p["bias"]

  side, patch, tokens = dinov2.SIZE // module.patch_size, module.patch_size, []
  channels = p["pos_embed"][0, 1:].reshape(module.grid, module.grid, -1).transpose(2, 0, 1).astype(np.float32)
  positions = [np.asarray(Image.fromarray(channel).resize((side, side), Image.BICUBIC)) for channel in channels]
  positions = np.stack(positions, axis=-1)
  for i in range(side):
    for j in range(side):
      pixels = x[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(-1)
      embed = p["patch_embed"]["proj"]
      tokens.append(pixels @ embed["kernel"].reshape(-1, module.width) + embed["bias"] + positions[i, j])
  x = np.concatenate([p["cls_token"][0] + p["pos_embed"][0, :1], p["register_tokens"][0], tokens])
  for i in range(module.depth):
    block, heads = p[f"blocks_{i}"], []
    qkv = np.split(dense(normalised(x, block["norm1"]), block["attn"]["qkv"]), 3, axis=1)
    for q, k, v in zip(*(np.split(part, module.num_heads, axis=1) for part in qkv)):
      heads.append(scipy.special.softmax(q @ k.T / math.sqrt(q.shape[1]), axis=1) @ v)
    scale_1, scale_2 = (block[f"ls{n}"]["gamma"] if module.layer_scale else 1 for n in (1, 2))
    x = x + scale_1 * dense(np.concatenate(heads, axis=1), block["attn"]["proj"])
    hidden = normalised(x, block["norm2"])
    if module.swiglu:
      gate, value = np.split(dense(hidden, block["mlp"]["w12"]), 2, axis=1)
      x = x + scale_2 * dense(gate * scipy.special.expit(gate) * value, block["mlp"]["w3"])
    else:
      hidden = dense(hidden, block["mlp"]["fc1"])
      hidden = hidden * (1 + scipy.special.erf(hidden / math.sqrt(2))) / 2
      x = x + scale_2 * dense(hidden, block["mlp"]["fc2"])
  return normalised(x[0], p["norm"])


@pytest.mark.parametrize("options", [dict(swiglu=True), dict(layer_scale=False)], ids=["swiglu", "no layer scale"])
def test_registers_gated_mlps_and_plain_residuals(options):
  """What the golden file has not: registers, with PIL's antialiased positions, and the kinds of blocks."""
  module = DINOv2(**SMALL, registers=3, **options)
  params = random_params(module)
  x = np.random.default_rng(1).normal(size=(2, dinov2.SIZE, dinov2.SIZE, 3))
  found = dinov2._network(module, jax.tree.map(jnp.float32, params), x.astype(np.float32))
  np.testing.assert_allclose(found, [expected_class_tokens(module, params, one) for one in x], atol=2e-4)


def test_positions_that_fit_are_not_resized():
  positions = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
  np.testing.assert_array_equal(dinov2._resize_positions(positions, 4, 4, antialias=False), positions)


def test_the_network_sees_normalised_pixels():
  white = np.full((1, 20, 30, 3), 255, np.uint8)
  expected = (1 - np.asarray(dinov2.MEAN)) / dinov2.DEVIATION
  for resize in dinov2.RESIZES:
    x = dinov2._prepare(white, resize)
    assert x.shape == (1, 224, 224, 3)
    np.testing.assert_allclose(x, np.broadcast_to(expected, x.shape), rtol=1e-5)


@pytest.mark.parametrize(
  "options, title, millions",
  [
    (dict(), "ViT-L/14", 304),
    (dict(width=1536, depth=40, num_heads=24, mlp_width=4096, swiglu=True), "ViT-g/14", 1136),
  ],
)
def test_published_sizes_have_their_parameters(options, title, millions):
  module = DINOv2(**options)
  count = sum(leaf.size for leaf in jax.tree.leaves(dinov2.parameter_shapes(module)))
  assert module.title == title and round(count / 1e6) == millions
  if title == "ViT-L/14":  # and the file a mask token, names and shapes
    assert 0 < convert.PUBLISHED_BYTES - 4 * (count + module.width) < 200_000
    assert module.clone(registers=4).title == "ViT-L/14 with 4 registers"


def test_every_product_is_in_full_precision(loaded):
  """A TPU would otherwise multiply in bfloat16, which no test on a CPU shows."""
  module, params = loaded
  jaxpr = jax.make_jaxpr(lambda images: dinov2.features(module, params, images))(GOLDEN["images_64x64"])
  precisions: list = []

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name in ("conv_general_dilated", "dot_general"):
        precisions.append(equation.params["precision"])
      for inner in jaxprs_in_params(equation.params):
        walk(inner)

  walk(jaxpr.jaxpr)
  assert len(precisions) == 2 + 1 + 2 + 3 * 6  # resizes of images and positions, patches, and blocks
  assert set(precisions) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_features_are_float32_where_jax_computes_in_float64(loaded):
  with jax.enable_x64(True):
    shape = jax.eval_shape(lambda images: dinov2.features(*loaded, images), GOLDEN["images_64x64"])
  assert shape.dtype == np.float32 and shape.shape == (3, 48)


# The features of two images, one on each of two simulated devices, inside an outer jit.
PROGRAM = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from eqm_jax.checkpoints import dinov2 as convert
from eqm_jax.networks import dinov2

module, params = convert.load(sys.argv[1] + "/weights.pth", num_heads=3)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
images = np.load(sys.argv[1] + "/golden.npz")["images_64x64"][:2]
images = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
found = jax.jit(lambda images: dinov2.features(module, params, images))(images)
json.dump({"places": [len(shard.data) for shard in found.addressable_shards], "found": found.tolist()}, sys.stdout)
"""


@pytest.mark.slow  # compiles the network for two devices
def test_images_may_lie_on_several_devices():
  output = json.loads(run_python("-c", PROGRAM, DIRECTORY, devices=2).stdout)
  assert output["places"] == [1, 1]
  np.testing.assert_allclose(output["found"], GOLDEN["features_64x64_bicubic"][:2], atol=5e-5)


@pytest.mark.parametrize(
  "images, seen",
  [
    (np.zeros((2, 28, 28, 1), np.uint8), r"uint8 \(2, 28, 28, 1\).* grey images \[B, H, W, 1\] by np.repeat"),
    (np.zeros((2, 3, 28, 28), np.uint8), r"uint8 \(2, 3, 28, 28\)"),
    (np.zeros((2, 28, 28, 3), np.float32), r"float32 \(2, 28, 28, 3\): convert floats in \[−1, 1\]"),
    ([[[[0, 0, 0]]]], "a list"),
  ],
)
def test_other_arrays_than_batches_of_images_are_refused(images, seen):
  with pytest.raises(ValueError, match=rf"DINOv2 takes images uint8 \[B, H, W, 3\], B ≥ 1, in 0..255, but got {seen}"):
    dinov2.features(DINOv2(**SMALL), {}, images)


@pytest.mark.parametrize("height, width", [(13, 28), (28, 13)])
def test_images_smaller_than_a_patch_are_refused(height, width):
  with pytest.raises(ValueError, match=f"at least 14 × 14 pixels, one patch, but got {height} × {width}: compare"):
    dinov2.features(DINOv2(), {}, np.zeros((1, height, width, 3), np.uint8))


def test_an_unknown_resize_is_refused():
  with pytest.raises(ValueError, match="resize = 'half_pixel' must be one of bicubic, tf1"):
    dinov2.features(DINOv2(), {}, GOLDEN["images_64x64"], "half_pixel")


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(num_heads=3), "num_heads = 3 does not divide the width 8"),
    (dict(num_heads=0), "num_heads = 0 must be at least 1"),
    (dict(patch_size=15), "patch_size = 15 must divide the 224 pixels"),
  ],
)
def test_attributes_that_do_not_fit_are_refused(options, message):
  with pytest.raises(ValueError, match=f"DINOv2.{message}"):
    DINOv2(**{**SMALL, **options})
