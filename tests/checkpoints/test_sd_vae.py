"""Every layout of the published weights gives the same module and parameters."""

import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from conftest import ROOT

from eqm_jax.checkpoints import sd_vae

DIRECTORY = ROOT / "tests" / "reference" / "vae_tiny"
WEIGHTS = sd_vae.WEIGHTS[0]


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
  return safetensors.numpy.load_file(DIRECTORY / WEIGHTS)


@pytest.fixture
def directory(tmp_path):
  shutil.copytree(DIRECTORY, tmp_path / "vae")
  return tmp_path / "vae"


def old_diffusers(name: str) -> str:
  for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
    name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
  return name


def original(name: str) -> str:
  """The name in the code of latent diffusion, which counts the decoder's levels from the finest."""
  name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{3 - int(match[1])}", name).replace("down_blocks.", "down.")
  name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
  for new, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
    name = name.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
  name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
  name = re.sub(r"(up|down)\.(\d)\.resnets\.", r"\1.\2.block.", name)
  name = name.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
  name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
  return f"first_stage_model.{name}"


def test_all_layouts_give_the_same(tensors, tmp_path, directory):
  module, params = sd_vae.load(str(DIRECTORY))
  assert module.block_out_channels == (8, 16, 24, 24) and module.scaling_factor == 0.18215 and module.reduction == 8

  safetensors.numpy.save_file({old_diffusers(name): array for name, array in tensors.items()}, directory / WEIGHTS)
  convolutions = {
    original(name): array[..., None, None] if re.search(r"\.to_\w+(\.0)?\.weight", name) else array
    for name, array in tensors.items()
  }
  assert "first_stage_model.decoder.up.3.block.0.conv1.weight" in convolutions
  safetensors.numpy.save_file(convolutions, tmp_path / "original.safetensors")
  shutil.copy(DIRECTORY / WEIGHTS, tmp_path / "alone.safetensors")
  for path in (directory, tmp_path / "original.safetensors", tmp_path / "alone.safetensors"):
    other, arrays = sd_vae.load(str(path), norm_num_groups=4)
    assert other == module, path
    jax.tree.map(np.testing.assert_array_equal, arrays, params)
    assert sd_vae.fingerprint(other, arrays) == sd_vae.fingerprint(module, params)


def test_one_changed_number_changes_the_fingerprint():
  module, params = sd_vae.load(str(DIRECTORY))
  before = sd_vae.fingerprint(module, params)
  assert sd_vae.fingerprint(module.clone(scaling_factor=0.13025), params) != before
  params["decoder"]["conv_out"]["bias"][0] += 1e-6
  assert sd_vae.fingerprint(module, params) != before


@pytest.mark.parametrize("dtype, tolerance", [(np.float16, 1e-3), (ml_dtypes.bfloat16, 1e-2)])
def test_half_precision_is_read(tensors, directory, dtype, tolerance):
  halved = {name: jax.numpy.asarray(array.astype(dtype)) for name, array in tensors.items()}
  safetensors.flax.save_file(halved, directory / WEIGHTS)
  leaf = sd_vae.load(str(directory))[1]["encoder"]["conv_in"]["kernel"]
  expected = tensors["encoder.conv_in.weight"].transpose(2, 3, 1, 0)
  assert leaf.dtype == np.float32
  np.testing.assert_allclose(leaf, expected, atol=tolerance)


def rewrite(directory, tensors, change):
  tensors = dict(tensors)
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / WEIGHTS)


def reconfigure(directory, **changes):
  config = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda d, t: (d / WEIGHTS).unlink(), "holds config.json and diffusion_pytorch_model.safetensors"),
    (
      lambda d, t: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:5000]),
      f"{WEIGHTS}: not a complete .safetensors",
    ),
    (lambda d, t: (d / "config.json").write_text("{"), "config.json: not readable as JSON"),
    (lambda d, t: (d / "config.json").write_text("{}"), "lacks block_out_channels, norm_num_groups"),
    (lambda d, t: reconfigure(d, shift_factor=0.1), "shift_factor = 0.1, but only None"),
    (lambda d, t: reconfigure(d, up_block_types=["AttnUpDecoderBlock2D"]), "AttnUpDecoderBlock2D"),
    (lambda d, t: reconfigure(d, latent_channels=8), r"has shape .*, but the config needs"),
    (lambda d, t: reconfigure(d, layers_per_block=1), r"up_blocks.0.resnets.2.conv1.bias and \d+ more"),
    (lambda d, t: rewrite(d, t, lambda t: t.pop("quant_conv.bias")), "has no quant_conv.bias"),
  ],
)
def test_damaged_and_foreign_files_are_named(directory, tensors, damage, message):
  damage(directory, tensors)
  with pytest.raises(ValueError, match=message):
    sd_vae.load(str(directory))


def test_attributes_that_a_single_file_lacks_must_be_given(tmp_path):
  with pytest.raises(ValueError, match="no such autoencoder"):
    sd_vae.load(str(tmp_path / "nowhere"))
  shutil.copy(DIRECTORY / WEIGHTS, tmp_path / "alone.safetensors")
  with pytest.raises(ValueError, match="give norm_num_groups"):
    sd_vae.load(str(tmp_path / "alone.safetensors"))
  safetensors.numpy.save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
  with pytest.raises(ValueError, match="other.safetensors: holds no AutoencoderKL"):
    sd_vae.load(str(tmp_path / "other.safetensors"))
