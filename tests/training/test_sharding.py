import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from eqm_jax.networks import dit
from eqm_jax.training import sharding, state
from eqm_jax.trees import path_name

MESH = AbstractMesh((1, 2, 4, 1), sharding.AXES)
SLICES = AbstractMesh((2, 2, 4, 1), sharding.AXES)


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
    ((None, "model"), "'model': parameters can be split over data, fsdp, tensor"),
    (("dcn_data", None), "'dcn_data': parameters can be split over data, fsdp, tensor"),
    (("fsdp",), r"1 axes, but kernel has shape \(8, 6\)"),
    ((None, "fsdp"), r"fsdp=4 does not divide an axis of kernel, shape \(8, 6\)"),
  ],
)
def test_a_rule_that_cannot_apply_names_parameter_shape_and_axis(axes, text):
  with pytest.raises(ValueError, match=text):
    specs({"kernel": (8, 6)}, [("kernel", axes)])


def test_a_batch_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match=r"batch size 12 does not divide over 8 devices \(data × fsdp\).*multiple of 8"):
    sharding.batch_sharding(MESH, 12)
  with pytest.raises(ValueError, match=r"batch size 24 does not divide over 16 devices \(dcn_data × data × fsdp\)"):
    sharding.batch_sharding(SLICES, 24)


@pytest.mark.parametrize(
  "sizes, text",
  [
    ((0, 1, 1), "data=0"),
    ((-1, -1, 1), "at most one -1"),
    ((3, -1, 1), "needs 3 devices or a multiple of them, but there are 1"),
    ((-1, 1, 1, 2), "mesh dcn_data=2, data=-1, fsdp=1, tensor=1 needs 2 devices or a multiple"),
    ((1, 1, 1, -1), "dcn_data=-1, .* at most one -1 for the rest, which dcn_data cannot be"),
  ],
)
def test_meshes_that_cannot_be_are_refused(sizes, text):
  with pytest.raises(ValueError, match=text):
    sharding.make_mesh(*sizes[:3], **dict(zip(("dcn_data",), sizes[3:])))


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh looks at: a GPU of a node, or a device of a CPU."""

  id: int
  process_index: int
  slice_index: int | None
  platform: str = "gpu"
  device_kind: str = "NVIDIA H100 80GB HBM3"


def devices(*slices: int | None, **kind: str) -> list[Device]:
  """One device a process, in the slices given."""
  return [Device(i, i, index, **kind) for i, index in enumerate(slices)]


def test_nodes_of_gpus_need_no_axis_of_their_own():
  mesh = sharding.make_mesh(4, 2, 1, devices=devices(0, 0, 0, 0, 1, 1, 1, 1))
  assert [device.id for device in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(
  "platform, slices, sizes, expected",
  [
    ("gpu", (0, 1, 0, 1, 0, 1, 0, 1), (2, 2, 1), [[0, 2, 4, 6], [1, 3, 5, 7]]),  # numbered across the slices
    ("gpu", (1, 1, 1, 1, 0, 0, 0, 0), (1, 4, 1), [[4, 5, 6, 7], [0, 1, 2, 3]]),
    ("cpu", (None,) * 8, (1, 2, 2), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("cpu", (0,) * 8, (1, 2, 2), [[0, 1, 2, 3], [4, 5, 6, 7]]),  # of several processes on one machine
  ],
)
def test_the_devices_of_a_slice_lie_together(platform, slices, sizes, expected):
  mesh = sharding.make_mesh(*sizes, dcn_data=2, devices=devices(*slices, platform=platform))
  assert [[device.id for device in np.ravel(one)] for one in mesh.devices] == expected


@pytest.mark.parametrize(
  "slices, text",
  [
    ((0,) * 8, r"mesh dcn_data=2, data=2, fsdp=2, tensor=1: .* of the 8 devices is 1: set config.mesh.dcn_data to 1$"),
    ((0, 1, 2, 3, 0, 1, 2, 3), "the number of slices .* is 4"),
    ((0, 0, 0, 0, 0, 0, 1, 1), "it does not fit the slices of the devices"),
  ],
)
def test_slices_that_the_mesh_does_not_fit_are_refused(slices, text):
  with pytest.raises(ValueError, match=text):
    sharding.make_mesh(2, 2, 1, dcn_data=2, devices=devices(*slices))


def test_slices_of_tpus_need_an_axis_of_their_own():
  two = devices(0, 0, 0, 0, 1, 1, 1, 1, platform="tpu", device_kind="TPU v5 lite")
  with pytest.raises(ValueError, match="mesh data=4, fsdp=2, tensor=1: .* is 2: set config.mesh.dcn_data to 2"):
    sharding.make_mesh(4, 2, 1, devices=two)


@pytest.mark.parametrize("data, fsdp", [(-1, None), (1, None), (-1, 1)])
def test_an_automatic_fsdp_is_what_there_are_devices_for(data, fsdp):
  assert set(sharding.make_mesh(data, fsdp, 1).shape.values()) == {1}


@pytest.mark.parametrize(
  "shape, axes, tensor, merged",
  [
    ((28, 1152, 3, 16, 72), (None, "fsdp", None, "tensor", None), 1, ((28, 1152, 3456), (None, "fsdp", None))),
    ((28, 16, 72, 1152), (None, "tensor", None, "fsdp"), 1, ((28, 1152, 1152), (None, None, "fsdp"))),
    ((28, 3, 16, 72), (None, None, "tensor", None), 1, ((28, 3456), (None, None))),
    ((28, 16, 72, 1152), (None, "tensor", None, "fsdp"), 2, None),
    ((28, 1152, 4608), (None, "fsdp", "tensor"), 1, ((28, 1152, 4608), (None, "fsdp", None))),
    ((28, 4608), (), 1, ((28, 4608), (None, None))),
  ],
)
def test_what_is_gathered_has_its_axes_merged_where_none_of_them_is_split(shape, axes, tensor, merged):
  placed = NamedSharding(AbstractMesh((1, 2, 16, tensor), sharding.AXES), PartitionSpec(*axes))
  expected = merged or (shape, axes)
  assert sharding._merged(shape, placed) == (expected[0], PartitionSpec(*expected[1]))


# What each axis of a large parameter is split over, where each has a device to split it over.
INTENT = {
  "blocks/qkv/kernel": (None, "fsdp", None, "tensor", None),  # depth, width, 3, heads, width of a head
  "blocks/attention_out/kernel": (None, "tensor", None, "fsdp"),
  "blocks/mlp_in/kernel": (None, "fsdp", "tensor"),
  "blocks/mlp_gate/kernel": (None, "fsdp", "tensor"),
  "blocks/qk_norm/scale": (),  # of all heads
  "blocks/mlp_out/kernel": (None, "tensor", "fsdp"),
  "blocks/modulation/kernel": (None, None, "fsdp"),
  "final_modulation/kernel": ("fsdp", None),
  "label_embed/embedding": (None, "fsdp"),
  "time_embed/dense_0/kernel": (None, "fsdp"),
  "time_embed/dense_1/kernel": (None, "fsdp"),
}


@pytest.mark.parametrize("size, modern", [*((size, False) for size in dit.SIZES), ("L", True)])
def test_the_table_says_where_every_large_parameter_lies(size, modern):
  """And moments and averages lie with their parameters; the rest is small enough for every device."""
  config = load_config("imagenet256", f"{size}/2")
  if modern:
    config.model.update(qk_norm=True, norm="rms", mlp="swiglu", rope=True)
  model, optimizer = dit.DiT(**config.model), state.make_optimizer(config.optimizer, 10)
  shapes = jax.eval_shape(lambda: state.init_state(model, optimizer, 0))
  mesh = AbstractMesh((2, 2, 16, 2), sharding.AXES)
  placed = sharding.state_shardings(shapes, config.sharding, mesh)
  matched = set()
  for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(placed)):
    name = path_name(path)
    intent = next((axes for ending, axes in INTENT.items() if name.endswith(ending)), None)
    if leaf.size * 4 > 2**20:
      assert intent, f"{name} {leaf.shape} is large, and nobody said where it is to lie"
    if intent:
      assert tuple(where.spec) == intent, name
      matched.add(name.split("/")[0])
    if any("tensor" in (axis or ()) for axis in where.spec):
      assert {"qkv", "mlp_in", "mlp_gate", "mlp_out", "attention_out"} & set(name.split("/"))
  assert matched == {"params", "ema_params", "opt_state"}


def test_every_rule_is_used():
  config = load_config("imagenet256", "B/2")
  kinds = [dit.DiT(**{**config.model, "energy": energy}) for energy in ("none", "scalar")]
  leaves = [leaf for kind in kinds for leaf in jax.tree_util.tree_leaves_with_path(dit.parameter_shapes(kind))]
  names = [path_name(path) for path, _ in leaves]
  first = {next(pattern for pattern, _ in config.sharding.rules if re.search(pattern, name)) for name in names}
  assert first == {pattern for pattern, _ in config.sharding.rules}


def test_the_average_may_lie_over_all_devices():
  config = load_config("imagenet256", "B/2")
  config.sharding.ema = "devices"
  model, optimizer = dit.DiT(**config.model), state.make_optimizer(config.optimizer, 10)
  shapes = jax.eval_shape(lambda: state.init_state(model, optimizer, 0))

  def share(tree, placed):
    sizes = [leaf.size for leaf in jax.tree.leaves(tree)]
    shards = [math.prod(s.shard_shape(leaf.shape)) for leaf, s in zip(jax.tree.leaves(tree), jax.tree.leaves(placed))]
    return sum(shards) / sum(sizes)

  for sizes, parameters, average in (((1, 8, 1, 1), 1, 1 / 8), ((2, 2, 4, 1), 1 / 4, 1 / 16)):
    placed = sharding.state_shardings(shapes, config.sharding, AbstractMesh(sizes, sharding.AXES))
    np.testing.assert_allclose(share(shapes.params, placed.params), parameters, rtol=0.02)
    np.testing.assert_allclose(share(shapes.opt_state, placed.opt_state), parameters, rtol=0.02)
    np.testing.assert_allclose(share(shapes.ema_params, placed.ema_params), average, rtol=0.02)
  # 2·32 divide no axis of this shape further, 32 do.
  shape, mesh = (28, 1152, 3, 16, 72), AbstractMesh((2, 32, 4, 1), sharding.AXES)
  assert sharding._also_over_data(shape, PartitionSpec(None, "fsdp"), mesh) == PartitionSpec(
    None, ("fsdp", "data"), None, None, None
  )
  config.sharding.ema = "nowhere"
  with pytest.raises(ValueError, match="sharding.ema = 'nowhere' must be one of parameters, devices"):
    sharding.state_shardings(shapes, config.sharding, MESH)


def test_microbatches_divide_too():
  sharding.batch_sharding(MESH, 64, 4)
  with pytest.raises(ValueError, match=r"batch size 24 .* 8 devices .* in 4 microbatches .* multiple of 32"):
    sharding.batch_sharding(MESH, 24, 4)
  with pytest.raises(ValueError, match="batch size 4 does not divide over 8 devices"):
    sharding.batch_sharding(MESH, 4)
