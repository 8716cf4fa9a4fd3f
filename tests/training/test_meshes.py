"""One device and eight: losses, gradients and runs on every kind of mesh, and samples."""

import json

import numpy as np
import pytest
from conftest import run_python

# Trains on each mesh, and writes losses, parameters, a gradient, samples, and how much one device holds.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from conftest import load_config
from eqm_jax.sampling.generator import Generator
from eqm_jax.networks.dit import DiT
from eqm_jax.checkpoints import manager as checkpoint_manager, pretrained
from eqm_jax.training import sharding, state, step, train

workdir, runs = sys.argv[1], json.loads(sys.argv[2])
rules = load_config("imagenet256", "B/2").sharding.rules

def perturbed(params):  # away from the start, where the zero output layer hides all others
  keys = iter(jax.random.split(jax.random.key(2), 100))
  return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape), params)

def gradient(config):
  mesh, model = sharding.make_mesh(**config.mesh), DiT(**config.model)
  optimizer = state.make_optimizer(config.optimizer, config.train.steps)
  shapes = jax.eval_shape(lambda: state.init_state(model, optimizer, 0))
  shardings = sharding.state_shardings(shapes, config.sharding, mesh)
  init = jax.jit(lambda: perturbed(state.init_state(model, optimizer, 0).params), out_shardings=shardings.params)
  batch = {"image": np.linspace(-1, 1, 16 * 64, dtype=np.float32).reshape(16, 8, 8, 1), "label": np.arange(16) % 10}
  batch = jax.device_put(batch, sharding.batch_sharding(mesh, 16))

  def loss_fn(params, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return step.batch_loss(model, config.objective, batch, jax.random.key(1), params)

  share = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(init())) / sum(
    leaf.size for leaf in jax.tree.leaves(shapes.params)
  )
  loss, found = jax.jit(jax.value_and_grad(loss_fn), out_shardings=(None, shardings.params))(init(), batch)
  return np.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(found))]), loss), share

for name, changes in runs.items():
  config = load_config("digits", "smoke")
  config.model.update(width=32, depth=2, num_heads=2)
  config.train.update(steps=20, batch_size=16, log_every=1)
  config.checkpoint.every = 20
  config.optimizer.warmup_steps = 1
  config.sharding.rules = rules
  config.objective.dispersive_weight = 0.5
  config.update_from_flattened_dict(changes)
  assert train.train(config, f"{workdir}/{name}")
  params = [pretrained.load(f"{workdir}/{name}", weights=which).params for which in ("model", "ema")]
  params = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
  losses = [json.loads(line)["loss"] for line in open(f"{workdir}/{name}/metrics.jsonl")]
  found, share = gradient(config)
  np.savez(f"{workdir}/{name}.npz", params=params, losses=losses, gradient=found, share=share)

if not sys.argv[3]:
  sys.exit()
trained = pretrained.load(f"{workdir}/{sys.argv[3]}")
generator = Generator(trained.model, trained.params, jax.random.key(0), batch_size=16, multiplier=4.0)
x = {}
for name, changes in {"continuous": {}, "static": {"batching": "static"}, "heun": {"rule": "heun"}}.items():
  row = config.samplers.gd.copy_and_resolve_references()
  row.update(changes)
  x[name] = generator.samples(name, row, np.arange(24, dtype=np.int32) % 10).result.x
np.savez(f"{workdir}/samples_{jax.device_count()}.npz", **x)
"""

PLAIN = {"objective.dispersive_weight": 0.0}
SLICES, TENSOR = "slices × fsdp × tensor", "data × fsdp × tensor"
MESHES = {  # changes of the config, and the share of the parameters that a device has at most
  SLICES: ({"mesh.dcn_data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, 0.5),
  TENSOR: ({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, 0.5),
  "data": ({"mesh.data": 8}, 1.0),
  "data, average split": ({"mesh.data": 8, "sharding.ema": "devices"}, 1.0),
  "fsdp": ({"mesh.data": 1, "mesh.fsdp": -1}, 0.2),
  "data × fsdp": ({"mesh.data": 2, "mesh.fsdp": 4}, 0.4),
  "slices × data × fsdp": ({"mesh.dcn_data": 2, "mesh.data": 2, "mesh.fsdp": 2, "sharding.ema": "devices"}, 0.6),
  "data × fsdp, remat": ({"mesh.data": 2, "mesh.fsdp": 4, "model.remat": "full", "model.unroll": 1}, 0.4),
  "data × fsdp, gathered once": (
    {"mesh.data": 2, "mesh.fsdp": 4, "sharding.gather": "step", "model.attention": "pallas_interpret"},
    0.4,
  ),
}
MODERN = {"model.qk_norm": True, "model.norm": "rms", "model.mlp": "swiglu", "model.rope": True}


def run(directory, devices: int, runs: dict[str, dict], sampled: str = ""):
  run_python("-c", PROGRAM, directory, json.dumps(runs), sampled, devices=devices, timeout=600)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """One device, and eight that play two slices."""
  directory = tmp_path_factory.mktemp("meshes")
  run(directory, 1, {"one": {}})
  run(directory, 8, {SLICES: MESHES[SLICES][0]})
  return directory


@pytest.fixture(scope="module")
def all_meshes(workdir):
  single = {"plain": PLAIN, "microbatches": {"train.grad_accum_steps": 4, **PLAIN}, "modern": MODERN}
  run(workdir, 1, single, "one")
  sharded = {"microbatches, sharded": {"train.grad_accum_steps": 4, **PLAIN, **MESHES[TENSOR][0]}}
  sharded["modern, sharded"] = {**MODERN, **MESHES[TENSOR][0], "sharding.gather": "step"}
  once = {"mesh.data": -1, "mesh.fsdp": None, "sharding.gather": "step"}
  sharded["microbatches, gathered once"] = {"train.grad_accum_steps": 2, **PLAIN, **once}
  run(workdir, 8, {name: changes for name, (changes, _) in MESHES.items() if name != SLICES} | sharded, "one")
  return workdir


def differences(workdir, name: str, against: str) -> dict[str, float]:
  """The largest difference, over the largest number, of each kind of result."""
  ours, theirs = (np.load(workdir / f"{one}.npz") for one in (name, against))
  assert len(ours["losses"]) == 20
  return {
    key: float(np.abs(ours[key] - theirs[key]).max() / np.abs(theirs[key]).max())
    for key in ("losses", "gradient", "params")
  }


def check(workdir, name: str):
  found = differences(workdir, name, "one")
  print(f"\n{name}: " + "  ".join(f"{key} {value:.1e}" for key, value in found.items()))
  assert 0 < found["gradient"] < 2e-6  # other orders of summation: not the same bits, but the same numbers
  assert found["losses"] < 2e-5 and found["params"] < 1e-3
  assert MESHES[name][1] / 2 < np.load(workdir / f"{name}.npz")["share"] <= MESHES[name][1]


def test_eight_devices_do_what_one_does(workdir):
  check(workdir, SLICES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if name != SLICES])
def test_every_mesh_does_what_one_device_does(all_meshes, name):
  check(all_meshes, name)


@pytest.mark.slow
def test_a_modern_block_is_split_over_heads_and_hidden_units(all_meshes):
  found = differences(all_meshes, "modern, sharded", "modern")
  assert found["gradient"] < 2e-6 and found["losses"] < 2e-5 and found["params"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["microbatches", "microbatches, sharded", "microbatches, gathered once"])
def test_a_run_in_microbatches_is_the_run(all_meshes, name):
  found = differences(all_meshes, name, "plain")
  assert found["losses"] < 2e-5 and found["params"] < 1e-3


@pytest.mark.slow  # their evaluation is tested elsewhere
def test_samples_do_not_depend_on_the_number_of_devices(all_meshes):
  one, eight = (np.load(all_meshes / f"samples_{count}.npz") for count in (1, 8))
  for name in one:
    np.testing.assert_allclose(eight[name], one[name], atol=1e-4)
  np.testing.assert_allclose(one["continuous"], one["static"], atol=1e-4)
