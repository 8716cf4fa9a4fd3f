import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import eqm_jax
from eqm_jax.networks.dit import DiT

MODEL = DiT(input_size=8, channels=1, patch_size=2, width=16, depth=2, num_heads=2, num_classes=3)


@pytest.fixture(scope="module")
def params():
  return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]


@pytest.fixture
def exported(tmp_path, params):
  eqm_jax.save_pretrained(tmp_path / "model", MODEL, params)
  return tmp_path / "model"


def test_what_is_saved_is_loaded(exported, params):
  for weights in ("ema", "model"):  # one set, which both names give
    loaded = eqm_jax.load(exported, weights=weights)
    assert loaded.model == MODEL and DiT(**loaded.config) == MODEL
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
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
  restored = ocp.StandardCheckpointer().restore(exported / "params")
  jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_overrides_change_how_the_model_computes(exported):
  assert eqm_jax.load(exported, dtype="bfloat16", unroll=2).model == MODEL.clone(dtype="bfloat16", unroll=2)


def test_a_checkpoint_of_another_shape_is_refused(exported):
  with pytest.raises(ValueError, match=r"blocks/.* has shape \(2, .*expects \(3, "):
    eqm_jax.load(exported, depth=3)


def test_nothing_is_overwritten(exported, params):
  with pytest.raises(ValueError, match="exists and is not empty"):
    eqm_jax.save_pretrained(exported, MODEL, params)
  assert eqm_jax.load(exported).model == MODEL


def test_damaged_directories_are_told(exported, tmp_path):
  with pytest.raises(ValueError, match="nowhere: no such model"):
    eqm_jax.load(tmp_path / "nowhere")
  (exported / "params" / "_METADATA").unlink()
  with pytest.raises(ValueError, match="model/params: damaged checkpoint"):
    eqm_jax.load(exported)
  (exported / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json: not readable as JSON"):
    eqm_jax.load(exported)


def test_a_workdir_without_checkpoints_is_told(exported):
  import shutil

  shutil.rmtree(exported / "params")
  with pytest.raises(ValueError, match="was it trained"):
    eqm_jax.load(exported)
