"""Slices by name, and what is refused before anything is compiled."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, load_config
from plans import flags_that_libtpu_knows, open_slice  # noqa: F401

from eqm_jax import hardware, modes
from eqm_jax.networks.dit import DiT
from eqm_jax.plan import plan, programs, topology
from eqm_jax.training import sharding


@pytest.mark.parametrize(
  "names, shape, chips, kind",
  [
    (("v5e:4x4", "v5e-16", "v5litepod-16"), "v5e:4x4", 16, "TPU v5e"),
    (("v5e-256",), "v5e:16x16", 256, "TPU v5e"),
    (("v6e-16",), "v6e:4x4", 16, "TPU v6e"),
    (("v5p-16", "v5p:2x2x2"), "v5p:2x2x2", 8, "TPU v5p"),
    (("v4-32", "v4:2x2x4"), "v4:2x2x4", 16, "TPU v4"),
    (("2xv5e:4x4", "2xv5e-16", "2xv5litepod-16"), "2xv5e:4x4", 32, "TPU v5e"),
  ],
)
def test_a_device_is_a_chip_whatever_the_slice_is_called(names, shape, chips, kind):
  for name in names:
    opened = open_slice(name)
    assert (opened.name, len(opened.devices), opened.chip.name) == (shape, chips, kind)
    assert opened.product == names[-1].replace("v5litepod", "v5e") or opened.product in names


@pytest.mark.parametrize(
  "name", ["v5e", "v5e-17", "0xv5e-16", "v5e:4by4", "v3-8", "h100-8", "v4:", "v5e:3x4", "v5e:4x4,v9-4"]
)
def test_an_unknown_slice_is_refused_with_the_known_ones(name):
  with pytest.raises(ValueError, match=r"--topology=\S+ .*v5e-\{1,4,8,16.*v5p-\{"):
    open_slice(name)


def test_slices_without_a_stated_network_are_refused():
  with pytest.raises(ValueError, match="--topology=2xv4-32: .* does not state .* of TPU v5e, TPU v6e: plan for one"):
    open_slice("2xv4-32")


def test_the_first_axis_of_a_mesh_is_that_of_slices():
  config, topology = load_config("imagenet256", "S/2"), open_slice("2xv5e-16")
  mesh = sharding.make_mesh(**{**config.mesh, "dcn_data": 2}, devices=topology.devices)
  assert [{device.slice_index for device in half.flat} for half in mesh.devices] == [{0}, {1}] and topology.slices == 2
  for slices in (1, 4):
    with pytest.raises(ValueError, match="of the 32 devices is 2: set config.mesh.dcn_data to 2"):
      sharding.make_mesh(**{**config.mesh, "dcn_data": slices}, devices=topology.devices)


def test_no_slice_is_refused_too():
  with pytest.raises(ValueError, match="needs --topology"):
    open_slice(" ,")


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(ValueError, match=r'pip install "eqm_jax\[plan\]"'):
    topology.open_topologies("v5e-16")


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"mesh.fsdp": 3, "mesh.data": -1}, "mesh data=-1, fsdp=3, tensor=1 needs 3 .* there are 4"),
    ({"mesh.data": 2, "mesh.fsdp": 2}, "needs 4 devices.* there are 16"),
    ({"train.batch_size": 24}, "batch size 24 does not divide over 16 devices"),
    ({"train.grad_accum_steps": 32}, "16 devices .* in 32 microbatches"),
    ({"mesh.fsdp": 1, "mesh.tensor": 4}, "sharding rule .* tensor=4 does not divide"),
    ({"model.channels": 16}, "model.channels = 16.* which has 4"),
    ({"samplers.published_b2.step_size": -1.0}, "samplers.published_b2: step_size"),
  ],
)
def test_a_config_that_does_not_fit_a_slice_is_refused_before_compilation(tmp_path, monkeypatch, changes, text):
  monkeypatch.setattr(plan, "compile_program", lambda *arguments: pytest.fail("compiled"))
  config = load_config("imagenet256", "S/2")
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=text):
    plan.plan(config, "v4-8,v5e-16", str(tmp_path / "plan"))
  assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize("name", ["imagenet256", "imagenet512"])
@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_shipped_configs_divide_over_the_slices_of_the_table(name, size):
  """Nothing else can go wrong before compilation; docs/plan.md has the figures of the compiled programs."""
  config = load_config(name, f"{size}/2")
  shapes = programs.state_shapes(config, DiT(**config.model))
  split = {"v5e-16": 16, "v5e-256": 16, "v6e-16": 16, "v5p-16": 8, "v4-32": 16, "v6e-1": 1, "v5e-4": 4, "v5e-8": 8}
  for where, fsdp in split.items():
    mesh = sharding.make_mesh(**config.mesh, devices=open_slice(where).devices)
    assert mesh.shape["fsdp"] == fsdp
    sharding.state_shardings(shapes, config.sharding, mesh)
    sharding.batch_sharding(mesh, config.train.batch_size, config.train.grad_accum_steps)


def test_every_generation_has_its_rates():
  assert {chip.name.removeprefix("TPU ") for kind, chip in hardware.CHIPS.items() if "TPU" in kind} == {
    *topology.SLICES
  }


@pytest.mark.parametrize(
  "mode, arguments, text",
  [
    (
      "plan",
      dict(checkpoint="x", topology="v5e-8"),
      "--checkpoint=x: --mode=plan takes no checkpoint: a plan needs no weights",
    ),
    ("plan", dict(checkpoint=None), "--mode=plan needs --topology"),
    ("sample", dict(checkpoint=None, topology="v5e-8"), "--topology=v5e-8: --mode=sample has no such flag"),
    ("train", dict(checkpoint=None, search=True), "--search: --mode=train has no such flag"),
  ],
)
def test_flags_that_do_not_belong_together_are_refused(tmp_path, mode, arguments, text):
  with pytest.raises(ValueError, match=re.escape(text)):
    modes.run(mode, load_config("imagenet256", "S/2"), str(tmp_path), **arguments)


def test_the_command_needs_nothing_set(tmp_path):
  """A machine without a TPU and without settings in the environment will do; a mistake gives one line."""
  environment = {name: value for name, value in os.environ.items() if name not in topology.ENVIRONMENT}
  command = [sys.executable, "-m", "eqm_jax.main", "--config=configs/imagenet256.py:S/2", f"--workdir={tmp_path}"]
  command += ["--mode=plan", "--topology=v5e-8", "--config.mesh.data=3"]
  process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
  assert process.returncode == 1 and "error: mesh data=3" in process.stderr, process.stderr
  assert "Traceback" not in process.stderr
