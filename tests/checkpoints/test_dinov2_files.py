"""Loading files of DINOv2, and the errors for other files."""

import re

import jax
import numpy as np
import pytest
from conftest import ROOT
from dinov2_weights import small_weights, write

from eqm_jax.checkpoints import dinov2 as convert
from eqm_jax.checkpoints import torch_pickle
from eqm_jax.networks import dinov2

TINY = ROOT / "tests" / "reference" / "dinov2_tiny" / "weights.pth"


@pytest.mark.parametrize(
  "options",
  [dict(), dict(registers=4), dict(swiglu=True), dict(layer_scale=False, depth=1), dict(width=128, grid=2)],
  ids=["plain", "registers", "swiglu", "no layer scale", "wider"],
)
def test_the_size_is_read_off_the_file(tmp_path, options, caplog):
  weights = small_weights(**options)
  caplog.set_level("INFO")
  module, params = convert.load(write(tmp_path / "weights.safetensors", weights))
  found = {name: getattr(module, name) for name in options}
  assert found == options and module.num_heads == module.width // 64
  assert re.search(r"DINOv2 ViT of width \d+ and depth \d/14.*, SHA-256 [0-9a-f]{64}\n", caplog.text)
  assert "but FD-DINOv2 is published for ViT-L/14: distances are not comparable" in caplog.text
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, dinov2.parameter_shapes(module))
  block, embed = params["blocks_0"], params["patch_embed"]["proj"]
  np.testing.assert_array_equal(block["attn"]["qkv"]["kernel"], weights["blocks.0.attn.qkv.weight"].T)
  np.testing.assert_array_equal(block["norm2"]["scale"], weights["blocks.0.norm2.weight"])
  np.testing.assert_array_equal(embed["kernel"][3, 5], weights["patch_embed.proj.weight"][:, :, 3, 5].T)
  assert all(leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in jax.tree.leaves(params))


def test_a_wrapped_set_of_half_precision_gives_the_same_parameters(tmp_path):
  weights = {name: array.astype(np.float16) for name, array in small_weights().items()}
  del weights["mask_token"]
  wrapped = {f"teacher.backbone.{name}": array for name, array in weights.items()}
  plain, other = (convert.load(write(tmp_path / "w.safetensors", w))[1] for w in (weights, wrapped))
  jax.tree.map(np.testing.assert_array_equal, plain, other)


def spoilt(name, value) -> dict[str, np.ndarray]:
  weights = small_weights()
  weights[name] = value(weights[name])
  return weights


@pytest.mark.parametrize(
  "weights, message",
  [
    (
      {name: a for name, a in small_weights().items() if "blocks.1.mlp" not in name},
      r"4 names are missing, 0 are unknown; missing: \['blocks.1.mlp.fc1.bias', .*; unknown: none",
    ),
    (
      {**small_weights(), "head.weight": np.zeros(3)},
      r"0 names are missing, 1 are unknown.*unknown: \['head.weight'\]",
    ),
    (
      {"embeddings.cls_token": np.zeros((1, 1, 64)), "encoder.layer.0.norm1.weight": np.zeros(64)},
      r"published names \(.*\), but \['embeddings.cls_token', 'encoder.layer.0.norm1.weight'\]: fetch dinov2_vitl14",
    ),
    (
      {name: a for name, a in small_weights().items() if name != "cls_token"},
      r"cls_token is missing among 3\d names, but an array of 3 axes was expected",
    ),
    (
      spoilt("blocks.1.attn.qkv.weight", lambda a: a[:100]),
      r"blocks.1.attn.qkv.weight has shape \(100, 64\), but with the other shapes in the file \(192, 64\) was expected",
    ),
    (spoilt("blocks.1.attn.qkv.weight", np.transpose), r"qkv.weight has shape \(64, 192\)"),
    (spoilt("pos_embed", lambda a: a[:, :9]), "pos_embed has 8 positions besides the class token's, but a square"),
    (spoilt("pos_embed", lambda a: a[0]), r"pos_embed has shape \(10, 64\), but an array of 3 axes was expected"),
    (spoilt("patch_embed.proj.weight", lambda a: a[..., :9]), "patch_size = 9 must divide the 224 pixels"),
    (spoilt("norm.bias", lambda a: a * np.where(np.arange(64) < 3, np.nan, 1)), "norm.bias: 3 of 64 values are not"),
    (small_weights(width=48), "the width 48 is no multiple of 64, the published width of a head: give num_heads"),
  ],
  ids=range(11),
)
def test_weights_that_do_not_fit_are_named(tmp_path, weights, message):
  path = write(tmp_path / "weights.safetensors", weights)
  with pytest.raises(ValueError, match=f"weights.safetensors.*{message}") as raised:
    convert.load(path)
  assert str(raised.value).count(str(path)) == 1


def test_heads_that_do_not_divide_the_width_are_refused():
  with pytest.raises(ValueError, match=r"weights.pth \(733,776 bytes\): DINOv2.num_heads = 5 does not divide .* 48"):
    convert.load(TINY, num_heads=5)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
  with pytest.raises(ValueError, match="nowhere.pth: no such file: fetch dinov2_vitl14_pretrain.pth.*1,217,586,395"):
    convert.load(tmp_path / "nowhere.pth")
  (tmp_path / "cut.pth").write_bytes(TINY.read_bytes()[:-1000])
  with pytest.raises(ValueError, match="cut.pth .* is truncated, or not a PyTorch file"):
    convert.load(tmp_path / "cut.pth")
  with pytest.raises(ValueError, match="eqm_tiny.pt: holds no weights with DINOv2's published names"):
    convert.load(ROOT / "tests" / "reference" / "eqm_tiny.pt")


def test_the_tiny_file_is_as_torch_saves_it():
  module, params = convert.load(TINY, num_heads=3)
  published = torch_pickle.read(TINY)
  assert (module.width, module.depth, module.grid, module.registers, module.layer_scale) == (48, 3, 37, 0, True)
  assert len(jax.tree.leaves(params)) == len(published) - 1  # the mask token
