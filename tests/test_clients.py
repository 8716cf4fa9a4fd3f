"""Programs of docs/clients, which read models of this package in processes where it cannot be imported."""

import importlib.util
import os
import pathlib
import runpy
import shlex
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, run_python

import eqm_jax
from eqm_jax.checkpoints import manager
from eqm_jax.io import write_json
from eqm_jax.networks.dit import DiT, attributes, parameter_shapes
from eqm_jax.training.state import TrainState

CLIENTS = ROOT / "docs" / "clients"
MODEL = DiT(input_size=8, channels=4, patch_size=2, width=16, depth=2, num_heads=2, num_classes=4, learn_sigma=True)
PROGRAM = """
import runpy, shlex, sys
sys.modules["eqm_jax"] = None  # now importing it, or a module of it, is an ImportError
try:
  import eqm_jax.io
except ImportError:
  pass
else:
  sys.exit("eqm_jax was imported")
script, *runs = sys.argv[1:]
for run in runs:
  sys.argv = [script, *shlex.split(run)]
  runpy.run_path(script, run_name="__main__")
"""


def run_client(name: str, *runs: list) -> str:
  """What docs/clients/NAME writes when it is run with these arguments, one run after another."""
  return run_python("-c", PROGRAM, CLIENTS / name, *(shlex.join(map(str, run)) for run in runs)).stdout


def random_params(seed: int) -> dict:
  """Parameters that are all in use."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), parameter_shapes(MODEL))


def saved_elsewhere(tree: pathlib.Path):
  """Makes a tree that Orbax has written one that is from devices that are not here."""
  sharding, device = tree / "_sharding", jax.devices()[0]
  text, name = sharding.read_text(), f"{device.platform}:{device.id}"
  assert name in text
  sharding.write_text(text.replace(name, "tpu:700"))


def write_workdir(path: pathlib.Path):
  """The checkpoint of a training run, of two steps, as the run writes it."""
  for step in (9, 10):
    state = TrainState(jnp.asarray(step), random_params(step), random_params(2 * step), optax.EmptyState())
    with manager.open_manager(str(path), keep=2) as checkpoints, manager.finishing(checkpoints):
      manager.save(checkpoints, step, jax.device_put(state), types.SimpleNamespace(get_state=dict))
    saved_elsewhere(path / "checkpoints" / str(step) / "state")
  write_json(str(path / "config.json"), {"model": attributes(MODEL)})


def test_orbax_and_flax_sample_an_export_and_a_checkpoint(tmp_path):
  eqm_jax.save_pretrained(tmp_path / "model", MODEL, random_params(0))
  write_workdir(tmp_path / "run")
  runs = {"model": ("model", "ema", 1.0), "ema": ("run", "ema", 0.0), "params": ("run", "model", 0.0)}
  commands = []
  for out, (path, weights, threshold) in runs.items():
    options = [f"--weights={'params' if weights == 'model' else 'ema_params'}", f"--threshold={threshold}"]
    options += ["--labels=0,1,2", "--max-nfe=9", "--step-size=0.05", f"--out={tmp_path}/{out}.npz"]
    commands.append([tmp_path / path, *options])
  listed = run_client("sample_with_flax.py", *commands)
  assert "blocks/qkv/kernel (2, 16, 3, 2, 8) float32" in listed and "label_embed/embedding (5, 16) float32" in listed
  found = {}
  for out, (path, weights, threshold) in runs.items():
    with np.load(tmp_path / f"{out}.npz") as file:
      found[out] = file["x"]
      field = eqm_jax.load(tmp_path / path, weights=weights).field(jnp.asarray(file["labels"]))
      expected = eqm_jax.descend(field, file["noise"], step_size=0.05, max_nfe=9, threshold=threshold)
      np.testing.assert_allclose(file["x"], expected.x, rtol=1e-4, atol=1e-4)
      np.testing.assert_array_equal(file["nfe"], expected.nfe)
  assert not np.allclose(found["ema"], found["params"])


def test_other_networks_are_refused_in_one_line():
  network_of = runpy.run_path(str(CLIENTS / "sample_with_flax.py"))["network_of"]
  with pytest.raises(SystemExit, match="the model is an explicit energy"):
    network_of(attributes(MODEL.clone(energy="dot")))
  with pytest.raises(SystemExit, match="the model has mlp = 'swiglu'"):
    network_of(attributes(MODEL.clone(mlp="swiglu")))


REFERENCE = os.environ.get("EQM_REFERENCE")  # folder of the authors' code


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
@pytest.mark.skipif(not REFERENCE, reason="EQM_REFERENCE does not name a folder of the authors' code")
def test_pytorch_samples_exports(tmp_path):
  import torch

  params = random_params(0)
  guided = dict(rule="nag", momentum=0.3), dict(guidance=1.5, guidance_channels=3)
  runs = {".pt": ({}, {}), ".safetensors": guided}
  commands = []
  for suffix, (descent, guidance) in runs.items():
    eqm_jax.export_reference(tmp_path / f"exported{suffix}", MODEL, params)
    files = [f"--checkpoint={tmp_path}/exported{suffix}", f"--out={tmp_path}/{suffix[1:]}"]
    numbers = [f"--momentum={descent.get('momentum', 0)}", f"--guidance={guidance.get('guidance', 1)}"]
    commands.append([f"--reference={REFERENCE}", *files, *numbers, "--labels=0,1,2", "--steps=9", "--device=cpu"])
  run_client("sample_with_pytorch.py", *commands)
  for suffix, (descent, guidance) in runs.items():
    found = {name: value.numpy() for name, value in torch.load(tmp_path / suffix[1:], weights_only=True).items()}
    field = eqm_jax.field(MODEL, params, jnp.asarray(found["labels"]), **guidance)
    expected = eqm_jax.descend(field, np.moveaxis(found["noise"], 1, -1), step_size=0.003, max_nfe=9, **descent)
    np.testing.assert_allclose(np.moveaxis(found["x"], 1, -1), expected.x, rtol=1e-4, atol=1e-5)


def test_the_notebook_shows_the_network_of_the_client():
  nbformat = pytest.importorskip("nbformat")
  client = (CLIENTS / "sample_with_flax.py").read_text(encoding="utf-8")
  notebook = nbformat.read(ROOT / "launch" / "colab_other_jax.ipynb", as_version=4)
  parts = [cell.source for cell in notebook.cells if "(nn.Module)" in cell.source]
  assert len(parts) == 2
  for part in parts:
    assert part.removeprefix("import flax.linen as nn\n\n\n") in client
