import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_config
from jax.sharding import AbstractMesh, PartitionSpec

from eqm_jax.training import sharding

MESH = AbstractMesh((2, 4, 1), sharding.AXES)


def specs(shapes, rules=()):
  leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  return {name: leaf.spec for name, leaf in sharding.tree_shardings(leaves, rules, MESH).items()}


def test_without_rules_fsdp_takes_the_largest_axis_that_it_divides():
  found = specs({"kernel": (3, 8, 16), "odd": (5, 7), "mixed": (4, 9), "scalar": ()})
  assert found == {
    "kernel": PartitionSpec(None, None, "fsdp"),
    "odd": PartitionSpec(),
    "mixed": PartitionSpec("fsdp", None),
    "scalar": PartitionSpec(),
  }


def test_the_first_rule_that_matches_decides():
  rules = (("qkv/kernel", (None, "fsdp", None)), ("kernel", (None, None, "fsdp")))
  tree = {"qkv": {"kernel": jnp.zeros((1, 8, 8))}, "out": {"kernel": jnp.zeros((1, 8, 8))}}
  found = sharding.tree_shardings(tree, rules, MESH)
  assert found["qkv"]["kernel"].spec == PartitionSpec(None, "fsdp", None)
  assert found["out"]["kernel"].spec == PartitionSpec(None, None, "fsdp")


@pytest.mark.parametrize(
  "axes, text",
  [
    ((None, "model"), "'model': the mesh has data, fsdp, tensor"),
    (("fsdp",), r"1 axes, but kernel has shape \(8, 6\)"),
    ((None, "fsdp"), r"fsdp=4 does not divide an axis of kernel, shape \(8, 6\)"),
  ],
)
def test_a_rule_that_cannot_apply_names_parameter_shape_and_axis(axes, text):
  with pytest.raises(ValueError, match=text):
    specs({"kernel": (8, 6)}, [("kernel", axes)])


def test_a_batch_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="batch size 12 does not divide over 8 devices.*multiple of 8"):
    sharding.batch_sharding(MESH, 12)


@pytest.mark.parametrize(
  "sizes, text", [((0, 1, 1), "data=0"), ((-1, -1, 1), "at most one"), ((3, -1, 1), "needs 3 devices, but there are 1")]
)
def test_meshes_that_cannot_be_are_refused(sizes, text):
  with pytest.raises(ValueError, match=text):
    sharding.make_mesh(*sizes)


# Trains and samples on a mesh of 8 pretended devices, and prints what came out.
PROGRAM = """
import json, sys
import jax, numpy as np
from conftest import load_config
from eqm_jax.evaluation import samplers
from eqm_jax.training import pretrained, sharding, train

workdir, mesh_sizes = sys.argv[1], json.loads(sys.argv[2])
config = load_config("digits", "smoke")
config.model.update(width=16, depth=2, num_heads=2)
config.train.update(steps=5, batch_size=16, log_every=1)
config.optimizer.warmup_steps = 1
config.mesh.update(mesh_sizes)
assert train.train(config, workdir)
trained = pretrained.load(workdir)
labels = np.arange(24, dtype=np.int32) % 10
batching = samplers.Batching(16, jax.random.key(0), 4.0)
x = {}
for name, changes in {"stream": {}, "lockstep": {"streaming": False}, "heun": {"rule": "heun"}}.items():
  row = config.samplers.gd.copy_and_resolve_references()
  row.update(changes)
  x[name] = samplers.draw(name, row, trained.model, trained.params, labels, batching).result.x.tolist()
json.dump({"devices": jax.device_count(), "x": x}, sys.stdout)
"""


def run_on(devices: int, workdir, **mesh) -> tuple[np.ndarray, dict[str, list]]:
  """The losses of five steps, and samples in three ways."""
  environment = {
    "PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
  }  # fmt: skip
  command = [sys.executable, "-c", PROGRAM, str(workdir), json.dumps(mesh)]
  finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  assert finished.returncode == 0, finished.stderr
  output = json.loads(finished.stdout)
  assert output["devices"] == devices
  losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return np.asarray(losses), output["x"]


def test_one_device_and_eight_agree(tmp_path):
  losses, x = run_on(1, tmp_path / "one", data=-1)
  assert len(losses) == 5
  other_losses, other_x = run_on(8, tmp_path / "eight", data=2, fsdp=4)
  np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
  for name in x:
    np.testing.assert_allclose(other_x[name], x[name], atol=1e-4)
  np.testing.assert_allclose(x["stream"], x["lockstep"], atol=1e-4)


def test_local_launcher_refuses_what_is_no_number():
  finished = subprocess.run([ROOT / "launch" / "local.sh", "many"], capture_output=True, text=True)
  assert finished.returncode == 2 and "usage:" in finished.stderr and "'many'" in finished.stderr


def test_shipped_rules_fit_the_shipped_models():
  from eqm_jax.networks import dit

  config = load_config("imagenet256", "XL/2")
  shapes = dit.parameter_shapes(dit.DiT(**config.model))
  mesh = AbstractMesh((1, 64, 1), sharding.AXES)
  found = sharding.tree_shardings(shapes, config.sharding.rules, mesh)
  for (path, leaf), (_, placed) in zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (shapes, found))):
    if leaf.size * 4 > 2**20:
      assert "fsdp" in placed.spec, f"{sharding.path_name(path)} {leaf.shape} is on every device"
