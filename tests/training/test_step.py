"""The training step: in microbatches, in less memory, in place, past batches that are not finite, and for GPUs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, run_python

from eqm_jax.equilibrium import objective
from eqm_jax.networks import flops
from eqm_jax.networks.dit import DiT
from eqm_jax.training import metric_logger, sharding, state, step


def small(**changes):
  config = load_config("digits", "smoke")
  config.model.update(width=32, depth=4, num_heads=2, patch_size=2, unroll=1)
  config.train.update(batch_size=64, steps=10)
  config.optimizer.warmup_steps = 0
  config.update_from_flattened_dict(changes)
  return config


def lowered(config):
  """(the step, compiled; the state before it; a batch)."""
  model, mesh = DiT(**config.model), sharding.make_mesh(1, 1, 1)
  optimizer = state.make_optimizer(config.optimizer, config.train.steps)
  shapes = jax.eval_shape(lambda: state.init_state(model, optimizer, 0))
  shardings = sharding.state_shardings(shapes, config.sharding, mesh)
  initial = jax.jit(lambda: state.init_state(model, optimizer, 0), out_shardings=shardings)()
  shape = (config.train.batch_size, *model.input_shape)
  batch = {"image": jnp.linspace(-1, 1, np.prod(shape)).reshape(shape), "label": jnp.arange(shape[0]) % 10}
  jitted = step.make_step(config, model, optimizer, mesh, shardings)
  return jitted.lower(initial, batch, None).compile(), initial, batch


@pytest.fixture(scope="module")
def steps():
  """The plain step, the same in four microbatches, and the same with every block computed again."""
  changes = {"plain": {}, "microbatches": {"train.grad_accum_steps": 4}, "full": {"model.remat": "full"}}
  return {name: lowered(small(**change)) for name, change in changes.items()}


@pytest.mark.parametrize("name", ["microbatches", "full"])
@pytest.mark.slow
def test_less_memory_for_the_same_gradient(steps, name):
  (plain, initial, batch), (other, other_initial, _) = steps["plain"], steps[name]
  temporary = [compiled.memory_analysis().temp_size_in_bytes for compiled in (plain, other)]
  assert temporary[1] < 0.6 * temporary[0]
  copies = [jax.tree.map(jnp.copy, one) for one in (initial, other_initial)]
  (after, metrics), (other_after, other_metrics) = plain(copies[0], batch, None), other(copies[1], batch, None)
  np.testing.assert_allclose(other_metrics["loss"], metrics["loss"], rtol=1e-6)
  np.testing.assert_allclose(other_metrics["gradient_norm"], metrics["gradient_norm"], rtol=1e-5)
  moments = [one.opt_state[0].mu["final_out"]["kernel"] for one in (after, other_after)]  # (1 − b1) · the gradient
  assert np.abs(moments[0]).max() > 0
  np.testing.assert_allclose(moments[1], moments[0], atol=1e-6 * np.abs(moments[0]).max())


@pytest.mark.slow
def test_the_state_is_updated_in_place(steps):
  compiled, initial, batch = steps["plain"]
  initial = jax.tree.map(jnp.copy, initial)
  compiled(initial, batch, None)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(initial))
  assert not batch["image"].is_deleted()


def test_gamma_comes_from_the_key_of_the_step_and_the_density_alone():
  config, label_B, key = small(), jnp.zeros(4000, jnp.int32), jax.random.key(3)
  model = DiT(**config.model).clone(input_size=2)

  def gamma(**changes):
    config.objective.update_from_flattened_dict({"gamma.kind": "uniform", "clean_fraction": 0.0} | changes)
    return step.sample_noise(model, config.objective, label_B, key).gamma_B

  uniform = gamma()
  np.testing.assert_array_equal(uniform, jax.random.uniform(jax.random.split(key, 5)[1], label_B.shape))
  consistent = gamma(**{"gamma.kind": "consistent", "gamma.floor": 0.1})
  assert consistent.mean() > uniform.mean() + 0.1, "1/c weighs the γ of small c"
  assert np.all(np.diff(consistent[np.argsort(uniform)]) > -1e-6)
  np.testing.assert_allclose(gamma(**{"gamma.kind": "logit_normal"}).std(), 0.21, atol=0.02)
  clean = gamma(**{"gamma.kind": "consistent", "clean_fraction": 0.25})
  assert abs(np.mean(clean == 1) - 0.25) < 0.03
  np.testing.assert_array_equal(clean[clean < 1], consistent[clean < 1])
  config.objective.kind = "flow_matching"  # of which c ≡ 1
  np.testing.assert_allclose(gamma(**{"gamma.kind": "consistent"}), uniform, atol=1e-6)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"clean_fraction": 0.25},
    {"schedule.kind": "self_stopping", "gamma.kind": "consistent", "clean_fraction": 0.25},
    {"schedule.kind": "linear", "gamma.kind": "logit_normal", "gamma.mean": 0.5},
    {"kind": "flow_matching", "gamma.kind": "logit_normal"},
  ],
)
def test_the_loss_scale_is_the_mean_square_of_the_magnitudes_that_are_sampled(changes):
  config = load_config("digits").objective
  config.update_from_flattened_dict(changes)
  model = DiT(**small().model).clone(input_size=2)
  gamma = step.sample_noise(model, config, jnp.zeros(20_000, jnp.int32), jax.random.key(0)).gamma_B
  c = objective.magnitude(gamma, objective.schedule_of(config))
  np.testing.assert_allclose(metric_logger.loss_scale(config), jnp.mean(c**2), rtol=0.03)


def test_batches_that_are_not_finite_are_skipped_and_counted():
  compiled, before, batch = lowered(small(**{"optimizer.max_skipped_batches": 2}))
  spoilt = {**batch, "image": batch["image"].at[3].set(jnp.nan)}
  kept, now, counts = jax.tree.map(np.array, before.params), before, []
  for one in (spoilt, spoilt, batch, spoilt):
    now, metrics = compiled(now, one, None)
    counts.append(int(metrics["skipped_batches"]))
    assert np.isfinite(metrics["parameter_norm"])
    if len(counts) == 2:
      jax.tree.map(np.testing.assert_array_equal, now.params, kept)
  assert counts == [1, 2, 2, 3] and int(now.step) == 4
  assert not np.array_equal(now.params["final_out"]["kernel"], kept["final_out"]["kernel"])
  for _ in range(2):  # with the one before, three in a row: one more than are skipped
    now, metrics = compiled(now, spoilt, None)
  assert not np.isfinite(metrics["parameter_norm"])


# Lowers the step of B/2 for two nodes of four GPUs, on a machine that has neither these nor their libraries.
ON_GPUS = """
import json, re
import jax, jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from conftest import load_config
from eqm_jax.networks import attention, dit
from eqm_jax.training import sharding, state, step

fused_attention_stablehlo.check_cudnn_version = lambda: 91000
attention.platform = lambda: "gpu"
config = load_config("imagenet256", "B/2")
config.mesh.update(dcn_data=2, data=2, fsdp=2)
model, mesh = dit.DiT(**config.model), sharding.make_mesh(**config.mesh)
optimizer = state.make_optimizer(config.optimizer, 10)
shapes = jax.eval_shape(lambda: state.init_state(model, optimizer, 0))
shardings = sharding.state_shardings(shapes, config.sharding, mesh)
placed = jax.tree.map(lambda leaf, own: leaf.update(sharding=own), shapes, shardings)
rows = sharding.batch_sharding(mesh, 256)
image = jax.ShapeDtypeStruct((256, *model.input_shape), jnp.float32, sharding=rows)
batch = {"mean": image, "logvar": image, "label": jax.ShapeDtypeStruct((256,), jnp.int32, sharding=rows)}
traced = step.make_step(config, model, optimizer, mesh, shardings).trace(placed, batch, None)
lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
calls = [line for line in lines if "custom_call @" in line]
print(json.dumps({
  "calls": [re.search(r"custom_call @([^(]+)", line)[1] for line in calls],
  "operands": [re.findall("tensor<[^>]+>", line.rsplit(" : (", 1)[1].split(" -> ")[0]) for line in calls],
  "weights": sum(type in line for line in lines for type in ("12x256x256xbf16>", "12x256x256xf32>")),
  "donated": sum(line.count("tf.aliasing_output") for line in lines),
  "leaves": len(jax.tree.leaves(shapes)),
}))
"""


def test_on_gpus_the_step_has_one_kernel_of_cudnn_forward_and_one_backward():
  """Each device's samples go through it; attention weights are nowhere, and the whole state is donated."""
  found = json.loads(run_python("-c", ON_GPUS, devices=8).stdout)
  assert found["calls"] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
  assert found["operands"][0] == ["tensor<32x256x12x64xbf16>"] * 3
  assert found["weights"] == 0 and found["donated"] == found["leaves"]


@pytest.mark.parametrize(
  "attributes",
  [
    {"energy": "scalar"},
    {"patch_size": 4, "mlp_ratio": 2.0},
    {"patch_size": 4, "qk_norm": True, "norm": "rms", "mlp": "swiglu", "rope": True},
    *(
      pytest.param(attributes, marks=pytest.mark.slow)
      for attributes in ({}, {"time_input": True}, {"learn_sigma": True})
    ),
  ],
  ids=str,
)
def test_the_formula_counts_what_the_compiler_counts(attributes):
  """Without a scan, whose body the compiler counts once; but for what is no matrix product."""
  model = DiT(**{**small().model, "depth": 2, "unroll": 2, "width": 128, "num_heads": 4, "patch_size": 1, **attributes})
  gamma = (jnp.zeros(8),) if model.time_input else ()
  x, label = jnp.zeros((8, *model.input_shape)), jnp.zeros(8, jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), x, label, *gamma)
  cost = jax.jit(model.apply).lower(params, x, label, *gamma).compile().cost_analysis()
  assert 0.85 < 8 * flops.forward(model) / cost["flops"] < 1.0


def test_known_sizes_take_the_published_flops():
  """119 G multiply-adds for XL/2, 23 G for B/2 (Peebles & Xie 2023, table 4)."""
  for name, published in (("XL/2", 118.64e9), ("B/2", 23.01e9)):
    model = DiT(**load_config("imagenet256", name).model)
    np.testing.assert_allclose(flops.forward(model) / 2, published, rtol=0.01)
  assert flops.training(model) == 3 * flops.forward(model)


@pytest.mark.parametrize("width, without", [(8, False), (4096, True)])
def test_large_activations_of_cpus_are_multiplied_without_ynnpack(tiny_config, width, without):
  tiny_config.model.width = width
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1)
  options = step._compiler_options(DiT(**tiny_config.model), 128, mesh)
  assert options in ((step.SUMS_BY_YNNPACK, None) if without else (None,))  # None: a version without the option


def test_an_option_that_the_compiler_does_not_know_is_left_out(tiny_config, monkeypatch):
  tiny_config.model.width = 4096
  monkeypatch.setattr(step, "SUMS_BY_YNNPACK", {"xla_no_such_option": "1"})
  assert step._compiler_options(DiT(**tiny_config.model), 128, sharding.make_mesh(data=1, fsdp=1, tensor=1)) is None
