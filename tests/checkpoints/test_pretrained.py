import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import eqm_jax
from eqm_jax.networks.dit import BLOCK_OPTIONS, DiT, parameter_shapes

MODEL = DiT(input_size=8, channels=1, patch_size=2, width=16, depth=2, num_heads=2, num_classes=3)


@pytest.fixture(scope="module")
def params():
  return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]


@pytest.fixture
def exported(tmp_path, params):
  eqm_jax.save_pretrained(tmp_path / "model", MODEL, params)
  return tmp_path / "model"


def test_a_saved_model_is_loaded(exported, params):
  for weights in ("ema", "model"):  # one set, which both names give
    loaded = eqm_jax.load(exported, weights=weights)
    assert loaded.model == MODEL and DiT(**loaded.config) == MODEL
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert not any(leaf.committed for leaf in jax.tree.leaves(loaded.params)), "or no mesh of other devices takes them"
  json.dumps(loaded.config)


def test_orbax_alone_reads_the_parameters(exported, params):
  program = (
    "import sys, orbax.checkpoint as ocp; tree = ocp.StandardCheckpointer().restore(sys.argv[1]);"
    "print(tree['label_embed']['embedding'].shape, 'eqm_jax' in sys.modules)"
  )
  finished = subprocess.run(
    [sys.executable, "-c", program, str(exported / "params")], capture_output=True, text=True, check=True
  )
  assert finished.stdout.split("\n")[0] == "(4, 16) False"


def test_names_of_classes_are_kept(params, tmp_path):
  eqm_jax.save_pretrained(tmp_path / "named", MODEL, params, class_names=("a", "b", "Zoë"))
  assert eqm_jax.load(tmp_path / "named").class_names == ("a", "b", "Zoë")
  eqm_jax.save_pretrained(tmp_path / "plain", MODEL, params)
  assert eqm_jax.load(tmp_path / "plain").class_names is None


def test_overrides_change_how_the_model_computes(exported):
  assert eqm_jax.load(exported, dtype="bfloat16", unroll=2).model == MODEL.clone(dtype="bfloat16", unroll=2)


def test_an_attribute_that_the_file_lacks_has_its_default(exported):
  config = json.loads((exported / "config.json").read_text())
  for name in BLOCK_OPTIONS:  # later than the first releases
    del config["model"][name]
  (exported / "config.json").write_text(json.dumps(config))
  assert eqm_jax.load(exported).model == MODEL


def test_the_options_of_the_blocks_are_saved(tmp_path):
  model = MODEL.clone(qk_norm=True, norm="rms", mlp="swiglu", rope=True)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), parameter_shapes(model))
  eqm_jax.save_pretrained(tmp_path / "model", model, zeros)
  assert eqm_jax.load(tmp_path / "model").model == model
  with pytest.raises(ValueError, match="mlp is 'swiglu' in the file, but 'gelu' is asked for"):
    eqm_jax.load(tmp_path / "model", mlp="gelu")


def test_a_checkpoint_of_another_shape_is_refused(exported):
  with pytest.raises(ValueError, match=r"depth is 2 in the file, but 3 is .*blocks/.* has shape \(2, .*expects \(3, "):
    eqm_jax.load(exported, depth=3)


def test_nothing_is_overwritten(exported, params):
  with pytest.raises(ValueError, match="exists and is not empty"):
    eqm_jax.save_pretrained(exported, MODEL, params)
  assert eqm_jax.load(exported).model == MODEL


def test_damaged_directories_are_refused(exported, tmp_path):
  with pytest.raises(ValueError, match="nowhere: no such model"):
    eqm_jax.load(tmp_path / "nowhere")
  (exported / "params" / "_METADATA").unlink()
  with pytest.raises(ValueError, match="model/params: damaged checkpoint"):
    eqm_jax.load(exported)
  (exported / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json: not readable as JSON"):
    eqm_jax.load(exported)


def test_a_workdir_without_checkpoints_is_refused(exported):
  shutil.rmtree(exported / "params")
  with pytest.raises(ValueError, match="was it trained"):
    eqm_jax.load(exported)


@pytest.mark.parametrize("path", ["model", "~/model"])
def test_relative_paths_are_saved_and_loaded(tmp_path, params, monkeypatch, path):
  """With the example of `save_pretrained`'s docstring."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  eqm_jax.save_pretrained(path, MODEL, params)
  jax.tree.map(np.testing.assert_array_equal, eqm_jax.load(path).params, params)
  restored = ocp.StandardCheckpointer().restore(pathlib.Path("model").absolute() / "params")
  jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_a_loaded_model_gives_its_field_and_energy(exported, params):
  loaded = eqm_jax.load(exported)
  x, labels = jnp.ones((2, 8, 8, 1)), jnp.array([0, 2])
  expected = eqm_jax.field(MODEL, params, labels, guidance=1.5)(x)
  np.testing.assert_array_equal(loaded.field(labels, guidance=1.5)(x), expected)
  np.testing.assert_array_equal(loaded.field(guidance=1.5)(x, labels), expected)
  energy_fn = eqm_jax.energy(MODEL, params, labels, "l2")
  np.testing.assert_array_equal(loaded.energy(labels, "l2")(x), energy_fn(x))
  assert "21 arrays" in repr(loaded) and len(repr(loaded)) < 200


def test_weights_of_another_program_in_a_directory_are_found(tmp_path, params):
  eqm_jax.export_reference(tmp_path / "model.safetensors", MODEL, params)
  (tmp_path / "config.json").write_text('{"architectures": ["EqM"]}')
  jax.tree.map(np.testing.assert_array_equal, eqm_jax.load(tmp_path).params, params)


def test_a_directory_of_this_package_is_read_whatever_else_is_in_it(exported, params):
  eqm_jax.export_reference(exported / "model.safetensors", MODEL, jax.tree.map(jnp.zeros_like, params))
  jax.tree.map(np.testing.assert_array_equal, eqm_jax.load(exported).params, params)


def test_a_model_is_loaded_from_a_disk_that_cannot_be_written(params):
  with tempfile.TemporaryDirectory() as directory:  # where another user may look, unlike tmp_path
    os.chmod(directory, 0o755)
    eqm_jax.save_pretrained(os.path.join(directory, "model"), MODEL, params)
    eqm_jax.load(os.path.join(directory, "model"))  # imports what it needs
    for path in (directory, *map(str, pathlib.Path(directory).rglob("*"))):
      os.chmod(path, 0o555 if os.path.isdir(path) else 0o444)
    user = os.geteuid()
    if user == 0:  # root may write anywhere
      os.seteuid(65534)
    try:
      with pytest.raises(PermissionError):
        open(os.path.join(directory, "model", "new"), "w")
      loaded = eqm_jax.load(os.path.join(directory, "model"))
    finally:
      os.seteuid(user)
      os.chmod(directory, 0o755)
      for path in pathlib.Path(directory).rglob("*"):
        path.chmod(0o755)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
