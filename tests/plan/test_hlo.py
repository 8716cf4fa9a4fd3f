"""Programs as text: sizes in memory, trip counts of loops, bytes on the links and in HBM, against counts by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from plans import flags_that_libtpu_knows, open_slice  # noqa: F401

from eqm_jax.plan import costs, hlo

# In the compiler's notation. The loop turns 5 times: from 1, by 2, while below 10 (1, 3, 5, 7, 9).
BY_HAND = """HloModule by_hand, is_scheduled=true, entry_computation_layout={(f32[64,128]{1,0:T(8,128)})->f32[64,128]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %kept = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,128}
}

%begins (shard: f32[8,128]) -> (f32[8,128], f32[32,128], u32[]) {
  %shard = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = f32[32,128]{1,0:T(8,128)} all-gather(%shard), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %start = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%carries (shard.1: f32[8,128]) -> f32[32,128] {
  %shard.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = f32[32,128]{1,0:T(8,128)} all-gather(%shard.1), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%updates (stack: f32[10,64,128], row: f32[64,128], place: s32[]) -> f32[10,64,128] {
  %stack = f32[10,64,128]{2,1,0:T(8,128)} parameter(0)
  %row = f32[64,128]{1,0:T(8,128)} parameter(1)
  %place = s32[] parameter(2)
  %lifted = f32[1,64,128]{2,1,0:T(8,128)} bitcast(%row)
  %none = s32[] constant(0)
  ROOT %written = f32[10,64,128]{2,1,0:T(8,128)} dynamic-update-slice(%stack, %lifted, %place, %none, %none)
}

%condition (state: (s32[], f32[64,128], f32[10,64,128], s32[])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[10,64,128]{2,1,0:T(8,128)}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} get-tuple-element(%state), index=3
  ROOT %below = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (state.1: (s32[], f32[64,128], f32[10,64,128], s32[])) -> (s32[], f32[64,128], f32[10,64,128], s32[]) {
  %state.1 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[10,64,128]{2,1,0:T(8,128)}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%counter.1, %two)
  %x.1 = f32[64,128]{1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %stack.1 = f32[10,64,128]{2,1,0:T(8,128)} get-tuple-element(%state.1), index=2
  %limit.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=3
  %all-reduce.2 = f32[64,128]{1,0:T(8,128)S(1)} all-reduce(%x.1), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
  %permute-start = (f32[64,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x.1), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  %permute-done = f32[64,128]{1,0:T(8,128)S(1)} collective-permute-done(%permute-start)
  %moved = f32[64,128]{1,0:T(8,128)} add(%all-reduce.2, %permute-done)
  %stacked = f32[10,64,128]{2,1,0:T(8,128)} fusion(%stack.1, %moved, %counter.1), kind=kLoop, calls=%updates
  ROOT %out = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[10,64,128]{2,1,0:T(8,128)}, /*index=3*/s32[]{:T(128)}) tuple(%next, %moved, %stacked, %limit.1)
}

ENTRY %main (given: f32[64,128], low: bf16[64,128], part: f32[8,128]) -> f32[64,128] {
  %given = f32[64,128]{1,0:T(8,128)} parameter(0)
  %low = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %part = f32[8,128]{1,0:T(8,128)} parameter(2)
  %one = s32[]{:T(128)} constant(1)
  %ten = s32[]{:T(128)} constant(10)
  %buffer = f32[10,64,128]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %scattered = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%low), kind=kCustom, calls=%all-reduce-scatter
  %begun = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}, u32[]{:S(2)}) fusion(%part), kind=kCustom, calls=%begins
  %carried = f32[32,128]{1,0:T(8,128)} fusion(%part), kind=kOutput, calls=%carries
  %first = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[10,64,128]{2,1,0:T(8,128)}, /*index=3*/s32[]{:T(128)}) tuple(%one, %given, %buffer, %ten)
  %loop = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[10,64,128]{2,1,0:T(8,128)}, /*index=3*/s32[]{:T(128)}) while(%first), condition=%condition, body=%body
  ROOT %last = f32[64,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
MESH = {"data": 2, "fsdp": 4, "tensor": 1}
X = 64 * 128 * 4  # bytes of the array that the loop moves


@functools.cache
def by_hand() -> hlo.Module:
  return hlo.parse(BY_HAND)


@pytest.mark.parametrize(
  "text, elements, padded",
  [
    ("f32[32,384]{1,0:T(8,128)}", 32 * 384, 4 * 32 * 384),
    ("f32[3,100]{1,0:T(8,128)S(1)}", 300, 4 * 8 * 128),
    ("bf16[12,3,6,64]{3,2,1,0:T(8,128)(2,1)}", 12 * 3 * 6 * 64, 2 * 12 * 3 * 8 * 128),
    ("bf16[384,10]{0,1:T(8,128)(2,1)}", 3840, 2 * 384 * 16),
    ("bf16[1,100]{1,0:T(1,128)(2,1)}", 100, 2 * 2 * 128),
    ("f32[300]{0:T(1024)}", 300, 4 * 1024),
    ("s32[]{:T(128)}", 1, 4 * 128),
    ("pred[7]", 7, 7),
  ],
)
def test_arrays_take_whole_tiles(text, elements, padded):
  (array,) = hlo.arrays(text)
  assert (array.elements, array.padded_bytes) == (elements, padded)
  assert array.space == (1 if "S(1)" in text else hlo.HBM)


def test_a_loop_turns_as_often_as_its_constants_say():
  module = by_hand()
  (loop,) = (i for i in module.entry_computation.instructions if i.opcode == "while")
  assert hlo.trip_count(module, module.entry_computation, loop) == 5
  assert [(c.name, times) for c, times in hlo.executed(module)] == [("main", 1), ("body", 5)]


@pytest.mark.parametrize(
  "old, new, turns",
  [
    ("direction=LT", "direction=LE", 5),
    ("constant(10)", "constant(9)", 4),
    ("%ten = s32[]{:T(128)} constant(10)", "%ten = s32[]{:T(128)} custom-call(%given)", None),
    ("add(%counter.1, %two)", "multiply(%counter.1, %two)", None),
  ],
)
def test_the_trip_count_of_a_loop_that_ends_by_the_data_is_unknown(old, new, turns):
  assert old in BY_HAND
  module = hlo.parse(BY_HAND.replace(old, new))
  (loop,) = (i for i in module.entry_computation.instructions if i.opcode == "while")
  assert hlo.trip_count(module, module.entry_computation, loop) == turns
  if turns is None:
    assert [times for _, times in hlo.executed(module, [3])] == [1, 3]


def test_bytes_on_the_links_are_those_of_the_rings():
  found = {one.kind: one for one in costs.find_collectives(by_hand(), MESH)}
  assert len(found) == 4
  expected = {  # (bytes, times, chips, axes, asynchronous)
    "all-reduce": (5 * 2 * X / 2, 5, 2, ("data",), False),
    "collective-permute": (5 * X, 5, 4, ("fsdp",), True),
    "reduce-scatter": (64 * 128 * 2 * 3 / 4, 1, 4, ("fsdp",), False),
    "all-gather": (32 * 128 * 4 * 3 / 4, 1, 4, ("fsdp",), True),  # continued by another fusion, and counted once
  }
  for kind, values in expected.items():
    one = found[kind]
    assert (one.bytes, one.times, one.chips, one.axes, one.asynchronous) == values, kind
  table = costs.by_kind(list(found.values()))
  assert table["all-reduce"] == {"count": 5, "bytes": 5 * X, "synchronous_bytes": 5 * X}
  assert table["all-gather"]["synchronous_bytes"] == 0


def test_a_collective_over_slices_is_one_within_each_and_one_between_them():
  found = {one.kind: one for one in costs.find_collectives(by_hand(), {"dcn_data": 2, "data": 2, "fsdp": 2})}
  reduced = found["all-reduce"]  # pairs of chips, one of each slice
  assert (reduced.axes, reduced.chips, reduced.slices) == (("dcn_data",), 2, 2)
  assert (reduced.bytes, reduced.dcn_bytes) == (0, 5 * 2 * X / 2)
  everywhere = dataclasses.replace(reduced, axes=("dcn_data", "data", "fsdp"), chips=8)
  assert (everywhere.bytes, everywhere.dcn_bytes) == (5 * 2 * X * 3 / 4, 5 * 2 * X / 4 / 2)
  gathered = dataclasses.replace(everywhere, kind="all-gather")
  assert (gathered.bytes, gathered.dcn_bytes) == (everywhere.bytes / 2, everywhere.dcn_bytes / 2)
  moved = dataclasses.replace(reduced, kind="collective-permute")
  assert (moved.bytes, moved.dcn_bytes) == (0, 5 * X)
  assert costs.by_kind([reduced])["all-reduce"] == {
    "count": 5, "bytes": 0, "synchronous_bytes": 0, "dcn_bytes": 5 * X,
  }  # fmt: skip
  assert found["all-gather"].dcn_bytes == 0


def test_a_transfer_to_the_runtime_between_slices_is_a_collective_of_each_chips_part():
  last = "  %ten = s32[]"
  attributes = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"'
  send = f"  %sent = (f32[8,128], u32[], token[]) send(%part, %token), frontend_attributes={{{attributes}}}"
  text = BY_HAND.replace(last, f"  %token = token[] after-all()\n{send}\n{last}")
  found = costs.find_collectives(hlo.parse(text), {"dcn_data": 4, "data": 2})
  (one,) = (one for one in found if one.slices == 4 and one.kind == "all-reduce" and one.asynchronous)
  assert (one.axes, one.bytes, one.dcn_bytes) == (("dcn_data",), 0, 2 * 8 * 128 * 4 * 3 / 4)


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
    ("[4,2]<=[2,4]T(1,0)", ("data",)),
    ("[2,4]<=[8]", ("fsdp",)),
    ("{}", ("data", "fsdp")),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp",)),
    ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_1'}", ("data", "fsdp")),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ("fsdp",)),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}", ("data",)),
    ("in an unknown notation", None),
  ],
)
def test_groups_of_chips_are_axes_of_the_mesh(groups, axes):
  old = "mesh['axis_0'=2,'axis_1'=4] {'axis_0'}"
  assert BY_HAND.count(old) == 1
  found = costs.find_collectives(hlo.parse(BY_HAND.replace(old, groups)), MESH)
  (one,) = (one for one in found if one.kind == "all-reduce")
  assert one.axes == axes
  three_axes = groups.endswith("{'axis_0','axis_1'}")  # half of fsdp: four chips
  assert one.chips == (4 if three_axes else math.prod(MESH[axis] for axis in axes or MESH))


def test_bytes_in_hbm_leave_out_vector_memory_and_untouched_slices():
  # A turn writes `moved` (its operands lie in vector memory), and the fusion reads it and writes one row of ten.
  row, moved = costs.find_movers(by_hand())
  assert (row.name, row.bytes, row.times, row.result) == ("stacked", 5 * 2 * X, 5, "f32[10,64,128]")
  assert (moved.name, moved.bytes, moved.times, moved.result) == ("moved", 5 * X, 5, "f32[64,128]")


def test_an_array_that_a_kernel_takes_several_times_is_read_once():
  last = "  %ten = s32[]"
  kernel = f'  %kernel = f32[64,128] custom-call(%given, %given, %low, %given), custom_call_target="kernel"\n{last}'
  assert BY_HAND.count(last) == 1
  (mover,) = (one for one in costs.find_movers(hlo.parse(BY_HAND.replace(last, kernel))) if one.name == "kernel")
  assert mover.bytes == X + X / 2 + X  # two operands, one of them in bfloat16, and the result


def test_estimates_of_the_compiler_are_added_up_as_often_as_they_run():
  old = "kind=kLoop, calls=%updates"
  text = BY_HAND.replace(old, old + ', backend_config={"window":[],"estimated_cycles":"70","other":"1"}')
  last = "get-tuple-element(%loop), index=1"
  text = text.replace(last, last + ', backend_config={"estimated_cycles":"3"}')
  assert costs.estimated_cycles(hlo.parse(text)) == 5 * 70 + 3


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="is no compiled program: pass the text of"):
    hlo.parse("")


@pytest.mark.parametrize("turns", [1, 6])
def test_a_compiled_loop_of_collectives_is_counted_exactly(turns):
  """Of arrays [8, 128] on each of 2 × 4 chips, S bytes, in every turn: an all-reduce over 4, a permute over 2."""
  mesh = Mesh(np.asarray(open_slice("v5e:2x4").devices).reshape(2, 4, 1), tuple(MESH))
  S = 8 * 128 * 4

  def per_chip(x):
    def turn(_, x):
      x = jax.lax.psum(jnp.sin(x), "fsdp")
      return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    return jax.lax.fori_loop(0, turns, turn, x)

  spec = PartitionSpec(("data", "fsdp"))
  function = jax.jit(jax.shard_map(per_chip, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
  x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, spec))
  found = costs.by_kind(costs.find_collectives(hlo.parse(function.lower(x).compile().as_text()), MESH))
  assert {kind: one["bytes"] for kind, one in found.items()} == {
    "all-reduce": turns * 2 * S * 3 / 4,
    "collective-permute": turns * S,
  }
